"""Targets made of a label and a teacher: the mixtures by dense logits, and how little rounding and cutting cost."""

import pytest
import torch

from lightning_llm.losses.distillation import bucket_targets, from_stored, mix_targets, teacher_entropy, to_stored
from lightning_llm.losses.likelihood import kl_divergence, token_log_likelihood, top_log_probabilities

COUNT, VOCABULARY = 25, 31
IDENTITY = torch.eye(VOCABULARY, dtype=torch.float64)


@pytest.fixture
def logits():
    """Of student and teacher, float64; both as hidden states under the head that changes nothing."""
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(COUNT, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.fixture
def labels():
    return torch.randint(VOCABULARY, (COUNT,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 1.0])
def test_the_mixture_is_the_two_likelihoods(weight, logits, labels):
    student, teacher = logits
    top1 = teacher.argmax(1)
    ids, weights = mix_targets(labels, top1, weight)
    assert weights.sum(1).tolist() == pytest.approx([1.0] * COUNT)
    got = token_log_likelihood(student, IDENTITY, ids, weights)
    log_p = student.log_softmax(1)
    expected = (1 - weight) * log_p.gather(1, labels[:, None]) + weight * log_p.gather(1, top1[:, None])
    torch.testing.assert_close(got, expected.squeeze(1), rtol=1e-6, atol=1e-6)


def test_a_teacher_that_agrees_is_plain_cross_entropy(logits, labels):
    ids, weights = mix_targets(labels, labels.to(torch.uint16), 0.9)
    got = token_log_likelihood(logits[0], IDENTITY, ids, weights)
    torch.testing.assert_close(got, token_log_likelihood(logits[0], IDENTITY, labels), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 2])
def test_bucket_and_label_by_dense_logits(k, weight, logits, labels):
    student, teacher = logits
    ids, log_p = top_log_probabilities(teacher, IDENTITY, labels, k)
    targets = bucket_targets(labels, ids, log_p, weight)
    torch.testing.assert_close(targets.weights.sum(1) + targets.tail, torch.ones(COUNT, dtype=torch.float64))
    got = token_log_likelihood(student, IDENTITY, targets.ids, targets.weights, tail_weight=targets.tail)
    p, log_q = teacher.softmax(1), student.log_softmax(1)
    for row in range(COUNT):
        kept = sorted({*teacher[row].topk(k).indices.tolist(), int(labels[row])})
        others = sorted(set(range(VOCABULARY)) - set(kept))
        taught = (p[row, kept] * log_q[row, kept]).sum() + p[row, others].sum() * log_q[row, others].logsumexp(0)
        expected = (1 - weight) * log_q[row, labels[row]] + weight * taught
        torch.testing.assert_close(got[row], expected, rtol=1e-9, atol=1e-9)


def test_what_is_kept_never_exceeds_the_whole_divergence_and_grows_to_it(logits, labels):
    student, teacher = logits
    whole = kl_divergence(student, IDENTITY, teacher, IDENTITY)
    before = torch.zeros(COUNT, dtype=torch.float64)
    for k in (1, 2, 8, 16, VOCABULARY - 2):
        ids, log_p = top_log_probabilities(teacher, IDENTITY, labels, k)
        targets = bucket_targets(labels, ids, log_p, 1.0)
        cross = -token_log_likelihood(student, IDENTITY, targets.ids, targets.weights, tail_weight=targets.tail)
        kept = cross - teacher_entropy(log_p)
        assert (kept >= before - 1e-9).all()
        assert (kept <= whole + 1e-9).all()
        before = kept
    torch.testing.assert_close(before, whole, rtol=0.05, atol=5e-3)


def test_the_teachers_entropy_by_hand():
    log_p = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log()
    torch.testing.assert_close(teacher_entropy(log_p), torch.tensor([1.5 * torch.tensor(2.0).log()]))


@pytest.mark.parametrize(("precision", "bound"), [("float16", 1e-3), ("uint8", 1 / 32)])
def test_what_is_stored_comes_back_within_its_step(precision, bound):
    log_p = torch.rand(1000, generator=torch.Generator().manual_seed(0)).mul(-15.9)
    stored = to_stored(log_p, precision)
    assert stored.element_size() == (2 if precision == "float16" else 1)
    error = (from_stored(stored) - log_p).abs()
    assert error.max() <= bound * (1 if precision == "uint8" else 16)
    assert from_stored(to_stored(torch.tensor([-torch.inf, -200.0]), precision)).max() < -15.9


@pytest.mark.parametrize("precision", ["float16", "uint8"])
def test_rounded_probabilities_add_up_again(precision, logits, labels):
    ids, log_p = top_log_probabilities(logits[1], IDENTITY, labels, 4)
    targets = bucket_targets(labels, ids, from_stored(to_stored(log_p, precision)), 1.0)
    torch.testing.assert_close(targets.weights.sum(1) + targets.tail, torch.ones(COUNT))
    exact = bucket_targets(labels, ids, log_p, 1.0)
    assert (targets.weights - exact.weights).abs().max() < (1e-3 if precision == "float16" else 0.03)


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_a_weight_is_a_share(weight, logits, labels):
    ids, log_p = top_log_probabilities(logits[1], IDENTITY, labels, 2)
    with pytest.raises(ValueError, match="teacher_weight"):
        mix_targets(labels, labels, weight)
    with pytest.raises(ValueError, match="teacher_weight"):
        bucket_targets(labels, ids, log_p, weight)
