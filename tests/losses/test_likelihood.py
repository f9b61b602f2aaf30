"""The vocabulary function against dense logits in float64: all options, both ways to the gradient, extremes, misuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.losses.likelihood import token_log_likelihood

COUNT, VOCABULARY, WIDTH = 37, 53, 16


def dense(
    hidden, weight, ids, target_weights=None, *, token_weights=None, tail_weight=None, softcap=None, temperature=1
):
    """The definition, by plain autograd: all logits, one row after the other for the tail."""
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=1)
    ids = ids.reshape(len(hidden), -1)
    target_weights = torch.ones_like(ids, dtype=hidden.dtype) if target_weights is None else target_weights
    values = (target_weights * log_p.gather(1, ids)).sum(1)
    if tail_weight is not None:
        others = [sorted(set(range(len(weight))) - set(row)) for row in ids.tolist()]
        log_tail = torch.stack([row[rest].logsumexp(0) for row, rest in zip(log_p, others, strict=True)])
        values = values + tail_weight * log_tail
    return values if token_weights is None else values * token_weights


def case(*, targets=1, weighted_targets=False, tail=False, dtype=torch.float64, count=COUNT):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:targets] for _ in range(count)])
    named = {}
    if tail:
        named["tail_weight"] = torch.rand(count, generator=generator, dtype=torch.float64).to(dtype)
    if weighted_targets:
        named["target_weights"] = torch.rand(count, targets, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids, named


def some_weights(count, seed=1):
    """One factor per token, some of them 0 and some negative."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, generator=generator, dtype=torch.float64)
    return weights * (torch.rand(count, generator=generator) > 0.3)


def in_float64(tensors, named):
    double = [t.detach().double().requires_grad_() for t in tensors]
    return double, {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in named.items()}


def assert_close(got, expected, precision=1e-5):
    torch.testing.assert_close(got.double(), expected, rtol=precision, atol=precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["gradient in forward", "gradient in backward"])
@pytest.mark.parametrize("tail", [False, True], ids=["", "tail"])
@pytest.mark.parametrize("targets", [1, 2, 7])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "target weights"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_and_gradients_are_the_dense_ones(softcap, temperature, weighted, targets, tail, mode, dtype):
    hidden, weight, ids, named = case(targets=targets, weighted_targets=weighted, tail=tail, dtype=dtype)
    named |= {"softcap": softcap, "temperature": temperature}
    factors = some_weights(COUNT)
    (hidden64, weight64), named64 = in_float64((hidden, weight), named)
    expected = dense(hidden64, weight64, ids, **named64) * factors
    if mode == "gradient in forward":
        got = token_log_likelihood(hidden, weight, ids, token_weights=factors.to(dtype), chunk=8, **named)
    else:
        got = token_log_likelihood(hidden, weight, ids, chunk=8, **named) * factors.to(dtype)
    assert got.dtype == dtype
    assert_close(got, expected)
    (0.25 * expected.sum()).backward()
    (0.25 * got.sum()).backward()
    assert_close(hidden.grad, hidden64.grad)
    assert_close(weight.grad, weight64.grad)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=["plain", "capped"])
@pytest.mark.parametrize("tail", [False, True], ids=["", "tail"])
def test_gradients_by_finite_differences(tail, options):
    hidden, weight, ids, named = case(targets=2, weighted_targets=True, tail=tail, count=3)
    hidden, weight = (t.detach()[:, :4].clone().requires_grad_() for t in (hidden, weight))

    def each_for_itself(hidden, weight):
        return token_log_likelihood(hidden, weight, ids, chunk=2, **named, **options)

    def summed(hidden, weight):
        factors = torch.tensor([0.5, 0.0, -2.0])
        return token_log_likelihood(hidden, weight, ids, token_weights=factors, chunk=2, **named, **options).sum()

    torch.autograd.gradcheck(each_for_itself, (hidden, weight))
    torch.autograd.gradcheck(summed, (hidden, weight))


@settings(max_examples=25)
@given(count=st.integers(0, 20), chunk=st.integers(1, 25), seed=st.integers(0, 99), weighted=st.booleans())
def test_the_chunk_makes_no_difference(count, chunk, seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    ids = torch.randint(9, (count,), generator=generator)
    token_weights = some_weights(count, seed) if weighted else None
    results = []
    for tokens in (chunk, None):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = token_log_likelihood(*inputs, ids, token_weights=token_weights, chunk=tokens)
        values.sum().backward()
        results.append((values.detach(), *(t.grad for t in inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("tail", [False, True], ids=["", "tail"])
def test_an_id_may_be_listed_twice(tail):
    # the label and the teacher's favourite are often the same; their weights then add up
    hidden, weight, ids, named = case(tail=tail)
    twice = ids.expand(-1, 2).contiguous()
    shares = torch.tensor([0.1, 0.9], dtype=torch.float64).expand(COUNT, 2)
    got = token_log_likelihood(hidden, weight, twice, shares, **named)
    got.sum().backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = token_log_likelihood(hidden, weight, ids, **named)
    expected.sum().backward()
    torch.testing.assert_close((got, *gradients), (expected, hidden.grad, weight.grad))


def test_bucket_of_a_teacher_has_the_full_gradient_on_the_cached_ids():
    # cross-entropy with the teacher's k likeliest and its tail: on these ids softmax - teacher, as with all ids
    logits = torch.randn(1, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(1, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)
    shares, ids = teacher.topk(5)
    hidden = logits.clone().requires_grad_()
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    (-token_log_likelihood(hidden, identity, ids, shares, tail_weight=1 - shares.sum(1))).sum().backward()
    torch.testing.assert_close(hidden.grad.gather(1, ids), (logits.softmax(1) - teacher).gather(1, ids))


@pytest.mark.parametrize("mode", ["gradient in forward", "gradient in backward"])
def test_large_logits_and_a_vanishing_tail_stay_exact(mode):
    # p of the listed ids rounds to 1 in float32, and the tail's share underflows in the second row
    logits = torch.tensor([[60.0, 59.0, -20.0, -21.0], [900.0, 899.0, -900.0, -901.0], [-900.0, 1.0, 900.0, 899.0]])
    ids, shares, tail = torch.tensor([[0, 1]] * 3), torch.tensor([[0.6, 0.3]] * 3), torch.full((3,), 0.1)
    inputs = logits.clone().requires_grad_(), torch.eye(4).requires_grad_()
    (hidden64, weight64), named64 = in_float64(inputs, {"target_weights": shares, "tail_weight": tail})
    expected = dense(hidden64, weight64, ids, **named64)
    expected.sum().backward()
    token_weights = torch.ones(3) if mode == "gradient in forward" else None
    got = token_log_likelihood(*inputs, ids, shares, tail_weight=tail, token_weights=token_weights)
    got.sum().backward()
    assert_close(got, expected)
    assert_close(inputs[0].grad, hidden64.grad)
    torch.testing.assert_close(inputs[1].grad.double(), weight64.grad, rtol=1e-5, atol=1e-3)  # of the order of 1,000


def test_masked_tokens_are_not_even_looked_at():
    hidden, weight, ids, _ = case()
    mask = (torch.arange(COUNT) % 3 == 0).double()
    broken = hidden.detach().masked_fill(mask[:, None] == 0, float("nan")).requires_grad_()
    token_log_likelihood(hidden, weight, ids, token_weights=mask).sum().backward()
    expected, weight.grad = weight.grad, None
    values = token_log_likelihood(broken, weight, ids, token_weights=mask)
    values.sum().backward()
    torch.testing.assert_close(weight.grad, expected)
    torch.testing.assert_close(broken.grad, hidden.grad)
    assert not values[mask == 0].any()
    assert not broken.grad[mask == 0].any()


@pytest.mark.parametrize("count", [COUNT, 0])
def test_nothing_to_learn_is_zero_and_no_nan(count):
    hidden, weight, ids, _ = case()
    hidden = hidden[:count].detach().requires_grad_()
    values = token_log_likelihood(hidden, weight, ids[:count], token_weights=torch.zeros(count))
    values.sum().backward()
    assert values.tolist() == [0.0] * count
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("mode", ["gradient in forward", "gradient in backward"])
def test_a_tied_embedding_gets_both_gradients(mode):
    _, embedding, ids, _ = case()
    inputs = torch.arange(COUNT) % VOCABULARY
    reference = embedding.detach().clone().requires_grad_()
    dense(reference[inputs].tanh(), reference, ids).sum().backward()
    token_weights = torch.ones(COUNT) if mode == "gradient in forward" else None
    token_log_likelihood(embedding[inputs].tanh(), embedding, ids, token_weights=token_weights).sum().backward()
    torch.testing.assert_close(embedding.grad, reference.grad)


@pytest.mark.parametrize("mode", ["gradient in forward", "gradient in backward"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_for_one_of_the_two(frozen, mode):
    hidden, weight, ids, _ = case()
    token_weights = torch.ones(COUNT) if mode == "gradient in forward" else None
    token_log_likelihood(hidden, weight, ids, token_weights=token_weights).sum().backward()
    kept, gone = (weight, hidden) if frozen == "hidden" else (hidden, weight)
    expected, kept.grad, gone.grad = kept.grad, None, None
    gone.requires_grad_(False)
    token_log_likelihood(hidden, weight, ids, token_weights=token_weights).sum().backward()
    torch.testing.assert_close(kept.grad, expected)
    assert gone.grad is None


@pytest.mark.parametrize("token_weights", [None, some_weights(COUNT)], ids=["", "weights"])
def test_without_gradients_the_values_are_the_same(token_weights):
    hidden, weight, ids, _ = case()
    expected = token_log_likelihood(hidden, weight, ids, token_weights=token_weights)
    with torch.no_grad():
        got = token_log_likelihood(hidden, weight, ids, token_weights=token_weights)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize("mode", ["gradient in forward", "gradient in backward"])
@pytest.mark.parametrize("through", ["bfloat16 tensors", "autocast"])
def test_half_precision_sums_in_float32(through, mode):
    hidden, weight, ids, _ = case(dtype=torch.float32)
    (hidden64, weight64), _ = in_float64((hidden, weight), {})
    expected = dense(hidden64, weight64, ids)
    expected.sum().backward()
    if through == "bfloat16 tensors":
        hidden, weight = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    token_weights = torch.ones(COUNT) if mode == "gradient in forward" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=through == "autocast"):
        got = token_log_likelihood(hidden, weight, ids, token_weights=token_weights, chunk=8)
        got.sum().backward()
    assert got.dtype == torch.float32
    assert (hidden.grad.dtype, weight.grad.dtype) == (hidden.dtype, weight.dtype)
    for result, exact in ((got, expected), (hidden.grad, hidden64.grad), (weight.grad, weight64.grad)):
        assert (result.double() - exact).norm() < 0.01 * exact.norm()


def test_half_precision_loses_nothing_to_small_chunks():
    # 2,048 equal contributions: a bfloat16 sum would stop growing after some 256 of them
    count = 2048
    hidden = torch.ones(count, 2, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    token_log_likelihood(hidden, weight, torch.zeros(count, dtype=torch.int64), chunk=1).sum().backward()
    expected = count * torch.tensor([0.75, -0.25, -0.25, -0.25]).unsqueeze(1).expand(4, 2)
    torch.testing.assert_close(weight.grad.float(), expected)


def test_ids_may_be_of_any_integer_type():
    hidden, weight, ids, _ = case(targets=2)
    got = token_log_likelihood(hidden, weight, ids.int())
    torch.testing.assert_close(got, token_log_likelihood(hidden, weight, ids))


@pytest.mark.parametrize(
    "misuse",
    [
        lambda values: (values * torch.arange(COUNT)).sum(),
        lambda values: values[1:].sum(),
        lambda values: values.square().sum(),
    ],
    ids=["a factor per token", "a part", "a curved function"],
)
def test_token_weights_refuse_a_gradient_per_token(misuse):
    hidden, weight, ids, _ = case()
    values = token_log_likelihood(hidden, weight, ids, token_weights=torch.ones(COUNT))
    with pytest.raises(RuntimeError, match="leave token_weights out"):
        misuse(values).backward()


@pytest.mark.parametrize(
    ("use", "factor"),
    [(lambda v: -v.sum() / 3, -1 / 3), (lambda v: v.mean(), 1 / COUNT), (lambda v: (-2 * v).sum(), -2)],
    ids=["sum", "mean", "sum of multiples"],
)
def test_token_weights_allow_one_factor_for_all(use, factor):
    hidden, weight, ids, _ = case()
    token_log_likelihood(hidden, weight, ids, token_weights=torch.ones(COUNT)).sum().backward()
    expected = hidden.grad * factor, weight.grad * factor
    hidden.grad = weight.grad = None
    use(token_log_likelihood(hidden, weight, ids, token_weights=torch.ones(COUNT))).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


@pytest.mark.parametrize("token_weights", [None, some_weights(COUNT)], ids=["", "weights"])
def test_a_retained_graph_can_be_gone_through_again(token_weights):
    hidden, weight, ids, _ = case()
    loss = token_log_likelihood(hidden, weight, ids, token_weights=token_weights).sum()
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [gradient.clone() for gradient in once]
    twice = torch.autograd.grad(2 * loss, (hidden, weight))
    torch.testing.assert_close(once, tuple(kept))
    torch.testing.assert_close(twice, tuple(2 * gradient for gradient in kept))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"chunk": 0}, "chunk"),
        ({"tail_weight": torch.ones(COUNT)}, "tail"),
    ],
    ids=["temperature", "softcap", "chunk", "no tail left"],
)
def test_arguments_out_of_range_are_refused(named, message):
    hidden, weight, _, _ = case()
    everything = torch.arange(VOCABULARY).expand(COUNT, VOCABULARY)
    with pytest.raises(ValueError, match=message):
        token_log_likelihood(hidden, weight, everything, **named)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (COUNT + 1, {}),
        (COUNT, {"target_weights": torch.ones(COUNT, 2)}),
        (COUNT, {"token_weights": torch.ones(COUNT - 1)}),
        (COUNT, {"tail_weight": torch.ones(COUNT, 1)}),
    ],
    ids=["target_ids", "target_weights", "token_weights", "tail_weight"],
)
def test_shapes_that_do_not_match_are_refused(rows, named):
    hidden, weight, _, _ = case()
    with pytest.raises((ValueError, TypeError)):  # TypeError where the test run checks the annotations
        token_log_likelihood(hidden, weight, torch.zeros(rows, dtype=torch.int64), **named)


STEP = """
from lightning_llm.losses.likelihood import token_log_likelihood

def step(count, vocabulary):
    hidden, ids = torch.randn(count, width, requires_grad=True), torch.randint(vocabulary, (count,))
    weight = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    before = status("VmRSS")
    token_weights = torch.ones(count) if "MODE" == "forward" else None
    softcap = 30.0 if "MODE" == "softcap" else None
    token_log_likelihood(hidden, weight, ids, token_weights=token_weights, softcap=softcap).sum().backward()
    return before
"""


@pytest.mark.parametrize(
    ("count", "mode"),
    [(640, "softcap"), *(pytest.param(4096, mode, marks=pytest.mark.slow) for mode in ("forward", "backward"))],
)
def test_memory_above_the_weights_gradient(count, mode, peak_of):
    """Dense logits would take 2.1 GB for 4,096 tokens, 0.3 GB for 640, and their gradient as much again."""
    assert peak_of(STEP.replace("MODE", mode), count, vocabulary=131_072, width=32) < 300


KEPT_STEP = """
from lightning_llm.losses.likelihood import token_log_likelihood

def step(count, vocabulary):
    kept = min(65, vocabulary // 2)
    ids = (torch.randint(vocabulary, (count, 1)) + torch.arange(kept)) % vocabulary
    hidden = torch.randn(count, width, requires_grad=True)
    weight = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    weights, tail = torch.rand(count, kept).div_(kept), torch.rand(count)
    token_weights = torch.ones(count) if "MODE" == "forward" else None
    before = status("VmRSS")
    options = {"target_weights": weights, "tail_weight": tail, "token_weights": token_weights}
    token_log_likelihood(hidden, weight, ids, **options).sum().backward()
    return before
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_memory_of_kept_targets_does_not_grow_with_tokens_times_vocabulary(mode, peak_of):
    """64 ids of a teacher, the label and the bucket of all others: more tokens are more chunks, one at a time.

    Distillation makes its gradients in the forward pass.
    """
    step = KEPT_STEP.replace("MODE", mode)
    few, many = (peak_of(step, count, vocabulary=65_536, width=32) for count in (1024, 4096))
    assert many < 350  # dense logits: 1.1 GB, and their gradient as much
    assert many - few < 60  # logits of 3,072 tokens more: 805 MB
