"""Distillation: the mixture of label and teacher from columns and from a live teacher, by dense probabilities."""

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.losses.distillation import to_stored
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.objectives.config import DistillationConfig

DOCUMENTS = [[1, 2, 3, 4, 9], [5, 6, 7, 9]]
MASKS = [[True, True, False, True, True], [True] * 4]


def transformer(seed, **shape):
    config = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = Transformer(ModelConfig(**(config | shape)))
    model.reset_parameters(seed)
    return model


@pytest.fixture
def student():
    return transformer(1)


@pytest.fixture
def teacher():
    """Wider, deeper, of another family, its logits capped."""
    return transformer(
        2, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=6, intermediate_size=40,
        family="gemma2", post_norms=True, norms_add_one=True, scale_embeddings=True, hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True, attention_bias=False, final_logit_softcapping=3.0,
    )  # fmt: skip


@pytest.fixture
def batch():
    return SegmentBatch.from_documents(DOCUMENTS, MASKS)


def log_probabilities(model, batch):
    """Of every target's place, float64 [N, V]."""
    return model.logits(model(batch)[batch.predictors]).double().log_softmax(1)


def with_columns(batch, teacher, k, stored_as="float16"):
    with torch.no_grad():
        hidden = teacher(batch)[batch.predictors]
        ids, log_p = teacher.top_log_probabilities(hidden, batch.target_ids, k)
    batch.columns.update(teacher_ids=ids.to(torch.uint16), teacher_logps=to_stored(log_p, stored_as))
    return batch


def assert_same(part, expected, student, precision=1e-4):
    """Loss and gradients of all parameters."""
    torch.testing.assert_close(part.loss.double(), expected, rtol=precision, atol=precision)
    part.loss.backward()
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    expected.backward()
    for gradient, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=10 * precision, atol=precision)


@pytest.mark.parametrize("weight", [0.0, 0.9, 1.0])
def test_top1_is_the_published_mixture(weight, student, teacher, batch):
    objective = DistillationConfig(teacher_weight=weight).build(student)
    part = objective.loss(with_columns(batch, teacher, k=1))
    assert part.count == batch.target_mask.sum() == 6
    log_q, favourite = log_probabilities(student, batch), log_probabilities(teacher, batch).argmax(1)
    of_label = log_q.gather(1, batch.target_ids[:, None]).squeeze(1)
    of_teacher = log_q.gather(1, favourite[:, None]).squeeze(1)
    expected = -((1 - weight) * of_label + weight * of_teacher)[batch.target_mask].sum()
    agrees = (favourite == batch.target_ids)[batch.target_mask].sum()
    assert part.metrics["teacher/favours_label"] == (agrees, 6)
    assert_same(part, expected, student)


def by_parts(p, q, labels, k):
    """Negative cross-entropy, and the teacher's own, over the k likeliest ids, the label and all others: [N] each."""
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(k).indices, True)
    kept.scatter_(1, labels[:, None], True)
    of_tail, of_student = ((~kept * x).sum(1) for x in (p, q))
    taught = (kept * p * q.log()).sum(1) + of_tail * of_student.log()
    return taught, (kept * p * p.log()).sum(1) + of_tail * of_tail.log()


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_what_is_kept_is_mixed_with_the_label(weight, student, teacher, batch):
    objective = DistillationConfig(targets="top_k", teacher_weight=weight).build(student)
    part = objective.loss(with_columns(batch, teacher, k=5))
    q, p = (log_probabilities(model, batch).exp() for model in (student, teacher))
    taught, own = by_parts(p.detach(), q, batch.target_ids, 5)
    of_label = q.log().gather(1, batch.target_ids[:, None]).squeeze(1)
    mixed = -((1 - weight) * of_label + weight * taught)[batch.target_mask].sum()
    if weight == 1:
        divergence, count = part.metrics["kl/teacher"]
        assert float(divergence) == pytest.approx(float((own - taught.detach())[batch.target_mask].sum()), abs=0.01)
        assert count == 6
    assert_same(part, mixed, student, precision=2e-3)  # log-probabilities are kept in 16 bits


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jensen_shannon"])
def test_a_live_teacher_is_asked_for_all_it_expects(direction, weight, student, teacher, batch):
    config = DistillationConfig(targets="full", teacher_weight=weight, direction=direction, beta=0.3, temperature=1.5)
    part = config.build(student, teacher=teacher).loss(batch)
    log_q, log_p = ((log_probabilities(m, batch) / 1.5).log_softmax(1) for m in (student, teacher))
    log_p = log_p.detach()
    log_m = torch.log(0.3 * log_p.exp() + 0.7 * log_q.exp())
    kl = {
        "forward": lambda: log_p.exp() * (log_p - log_q),
        "reverse": lambda: log_q.exp() * (log_q - log_p),
        "jensen_shannon": lambda: 0.3 * log_p.exp() * (log_p - log_m) + 0.7 * log_q.exp() * (log_q - log_m),
    }[direction]().sum(1)
    of_label = log_probabilities(student, batch).gather(1, batch.target_ids[:, None]).squeeze(1)
    expected = (weight * 1.5**2 * kl - (1 - weight) * of_label)[batch.target_mask].sum()
    assert float(part.metrics["kl/teacher"][0]) == pytest.approx(float(kl.detach()[batch.target_mask].sum()), rel=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert_same(part, expected, student)


def test_a_temperature_softens_what_is_kept_too(student, teacher, batch):
    config = DistillationConfig(targets="top_k", teacher_weight=1.0, temperature=2.0)
    with torch.no_grad():
        hidden = teacher(batch)[batch.predictors]
        ids, log_p = teacher.top_log_probabilities(hidden, batch.target_ids, 5, temperature=2.0)
    batch.columns.update(teacher_ids=ids, teacher_logps=log_p)
    q, p = ((log_probabilities(model, batch) / 2).softmax(1) for model in (student, teacher))
    taught, _ = by_parts(p.detach(), q, batch.target_ids, 5)
    assert_same(config.build(student).loss(batch), -4 * taught[batch.target_mask].sum(), student)


def test_held_out_rows_are_measured_by_their_labels(student, teacher, batch):
    objective = DistillationConfig(targets="full").build(student, teacher=teacher)
    of_label = log_probabilities(student, batch).gather(1, batch.target_ids[:, None]).squeeze(1)
    part = objective.held_out_loss(batch)  # no columns are needed either
    torch.testing.assert_close(part.loss.double(), -of_label[batch.target_mask].sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "jensen_shannon"])
def test_rows_that_the_teacher_lacks_lose_their_mass(direction, teacher, batch):
    """A head that is padded further, as 152,064 rows against 151,936: it is sampled from, so it is normalised whole."""
    student = transformer(1, vocab_size=24)
    config = DistillationConfig(targets="full", teacher_weight=1.0, direction=direction, beta=0.3)
    part = config.build(student, teacher=teacher).loss(batch)
    p = torch.nn.functional.pad(log_probabilities(teacher, batch).exp().detach(), (0, 4))
    q = log_probabilities(student, batch).exp()
    m = 0.3 * p + 0.7 * q
    kl = torch.special.xlogy(p, p) - p * q.log()
    if direction == "jensen_shannon":
        kl = 0.3 * (torch.special.xlogy(p, p) - p * m.log()) + 0.7 * q * (q / m).log()
    assert_same(part, kl.sum(1)[batch.target_mask].sum(), student)


def test_what_is_kept_and_what_is_asked_agree_on_rows_that_the_teacher_lacks(teacher, batch):
    """Of all that a teacher of 20 ids expects: 18 ids, the label, and a bucket of the one left and all padding."""
    gradients = []
    for config in (DistillationConfig(targets="top_k", k=18), DistillationConfig(targets="full")):
        student = transformer(1, vocab_size=24)
        part = config.build(student, teacher=teacher).loss(with_columns(batch, teacher, k=18))
        part.loss.backward()
        gradients.append(student.head_weight.grad[20:])
    torch.testing.assert_close(*gradients, rtol=0.05, atol=1e-3)


def test_rows_of_padding_in_the_teachers_head_do_not_matter(student, batch):
    wider = transformer(2, vocab_size=24)
    part = DistillationConfig(targets="full", teacher_weight=1.0).build(student, teacher=wider).loss(batch)
    p = wider.logits(wider(batch)[batch.predictors])[:, :20].double().softmax(1).detach()
    log_q = log_probabilities(student, batch)
    expected = (p * (p.log() - log_q)).sum(1)[batch.target_mask].sum()
    assert_same(part, expected, student)


@pytest.mark.parametrize("config", [
    DistillationConfig(), DistillationConfig(targets="top_k"), DistillationConfig(targets="full"),
], ids=lambda config: config.targets)  # fmt: skip
def test_a_batch_in_which_nothing_counts_reaches_every_parameter(config, student, teacher):
    filler = SegmentBatch.from_documents([[1, 2]], [[False, False]])
    ids, log_p = torch.zeros(1, 3, dtype=torch.uint16), torch.zeros(1, 5, dtype=torch.uint8)
    filler.columns.update(teacher_ids=ids, teacher_logps=log_p)
    part = config.build(student, teacher=teacher).loss(filler)
    part.loss.backward()
    assert part.loss == 0
    assert part.count == 0
    assert [name for name, p in student.named_parameters() if p.grad is None or p.grad.any()] == []


def test_the_teacher_is_no_part_of_the_objective(student, teacher):
    objective = DistillationConfig(targets="full").build(student, teacher=teacher)
    assert set(objective.state_dict()) == {f"model.{name}" for name in student.state_dict()}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": "all"}, "targets"),
        ({"teacher_weight": 1.1}, "teacher_weight"),
        ({"k": 0}, "k must"),
        ({"stored_as": "int4"}, "stored_as"),
        ({"direction": "reverse"}, "knows forward alone"),
        ({"targets": "full", "beta": 0.0}, "beta"),
        ({"temperature": 2.0}, "keep them apart"),
        ({"targets": "top_k", "temperature": 2.0}, "keep them apart"),
        ({"targets": "full", "temperature": 0.0}, "temperature"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**wrong)
