"""Student against teacher, each with its own head: dense logits in float64, both ways to the gradient, extremes."""

import pytest
import torch

from lightning_llm.losses.likelihood import kl_divergence, token_log_likelihood, top_log_probabilities

COUNT, VOCABULARY, STUDENT, TEACHER = 29, 41, 12, 20
DIRECTIONS = ["forward", "reverse", "jensen_shannon"]


def dense(
    student, weight, teacher, teacher_weight, *, direction, beta=0.5, student_softcap=None, teacher_softcap=None,
    temperature=1.0,
):  # fmt: skip
    """The definitions by probabilities, all logits at once."""

    def probabilities(hidden, head, softcap):
        logits = hidden @ head.T
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.softmax(logits / temperature, 1)

    def kl(a, b):
        return torch.where(a > 0, a * torch.log(torch.where(a > 0, a, 1.0) / b), 0.0).sum(1)

    q = probabilities(student, weight, student_softcap)
    p = probabilities(teacher, teacher_weight, teacher_softcap)
    p = torch.nn.functional.pad(p, (0, q.shape[1] - p.shape[1]))  # of ids that the teacher lacks: never
    if direction == "forward":
        return kl(p, q)
    if direction == "reverse":
        return kl(q, p)
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def case(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(COUNT, STUDENT), (VOCABULARY, STUDENT), (COUNT, TEACHER), (VOCABULARY, TEACHER)]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) * 0.7 for shape in shapes]
    return [tensor.requires_grad_(number < 2) for number, tensor in enumerate(tensors)]


def some_weights(seed=1):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(COUNT, generator=generator, dtype=torch.float64)
    return weights * (torch.rand(COUNT, generator=generator) > 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["gradient in forward", "gradient in backward"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.7}, {"student_softcap": 2.0}, {"teacher_softcap": 3.0},
     {"student_softcap": 2.0, "teacher_softcap": 3.0, "temperature": 0.8, "beta": 0.2}],
    ids=["plain", "temperature", "student's cap", "teacher's cap", "all"],
)  # fmt: skip
def test_values_and_gradients_are_the_dense_ones(options, direction, mode, dtype):
    tensors = case(dtype)
    double = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    factors = some_weights()
    expected = dense(*double, direction=direction, **options) * factors
    if mode == "gradient in forward":
        got = kl_divergence(*tensors, direction=direction, chunk=8, token_weights=factors.to(dtype), **options)
    else:
        got = kl_divergence(*tensors, direction=direction, chunk=8, **options) * factors.to(dtype)
    assert got.dtype == dtype
    precision = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got.double(), expected, **precision)
    (0.25 * expected.sum()).backward()
    (0.25 * got.sum()).backward()
    for own, exact in zip(tensors[:2], double[:2], strict=True):
        torch.testing.assert_close(own.grad.double(), exact.grad, **precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["gradient in forward", "gradient in backward"])
@pytest.mark.parametrize(
    ("direction", "options"),
    [
        ("forward", {}),
        ("forward", {"student_softcap": 2.0, "teacher_softcap": 3.0, "temperature": 0.8}),
        ("jensen_shannon", {"beta": 0.2}),
        ("jensen_shannon", {"student_softcap": 2.0, "temperature": 1.7, "beta": 0.9}),
    ],
)
def test_ids_that_the_teacher_lacks_have_no_probability(direction, options, mode, dtype):
    """The student is normalised over all its ids, and its mass goes from those that the teacher has not."""
    tensors = case(dtype)
    tensors[3] = tensors[3][:-7]
    double = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    factors = some_weights()
    expected = dense(*double, direction=direction, **options) * factors
    if mode == "gradient in forward":
        got = kl_divergence(*tensors, direction=direction, chunk=8, token_weights=factors.to(dtype), **options)
    else:
        got = kl_divergence(*tensors, direction=direction, chunk=8, **options) * factors.to(dtype)
    precision = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got.double(), expected, **precision)
    expected.sum().backward()
    got.sum().backward()
    for own, exact in zip(tensors[:2], double[:2], strict=True):
        torch.testing.assert_close(own.grad.double(), exact.grad, **precision)
    assert tensors[1].grad[-7:].abs().amin() > 0


def test_two_ids_of_which_the_teacher_has_one_by_hand():
    # p = (1, 0), q = (1/4, 3/4); m = (5/8, 3/8)
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [3.0]]).log()
    one, log = torch.zeros(1, 1), lambda value: torch.tensor(value).log()
    expected = {
        "forward": log(4.0),
        "jensen_shannon": 0.5 * log(1.6) + 0.5 * (0.25 * log(0.4) + 0.75 * log(2.0)),
    }
    for direction, value in expected.items():
        got = kl_divergence(hidden, weight, one, torch.zeros(1, 1), direction=direction)
        torch.testing.assert_close(got, value[None])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_by_finite_differences(direction):
    student, weight, teacher, teacher_weight = (t.detach() for t in case())
    student, weight = student[:3, :4].clone().requires_grad_(), weight[:, :4].clone().requires_grad_()

    def divergence(hidden, head):
        options = {"direction": direction, "beta": 0.3, "student_softcap": 3.0, "temperature": 0.7, "chunk": 2}
        return kl_divergence(hidden, head, teacher[:3], teacher_weight, **options)

    torch.autograd.gradcheck(divergence, (student, weight))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_is_left_where_both_agree(direction):
    hidden, weight, *_ = case()
    got = kl_divergence(hidden, weight, hidden, weight, direction=direction)
    got.sum().backward()
    torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden), rtol=0, atol=1e-12)


def test_two_ids_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2); m = (5/8, 3/8)
    hidden, weight = torch.zeros(1, 1), torch.eye(2, 1)
    teacher = torch.tensor([[3.0]]).log()
    expected = {
        "forward": 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log(),
        "reverse": 0.5 * torch.tensor(4 / 3).log(),
        "jensen_shannon": 0.5 * (0.75 * torch.tensor(1.2).log() + 0.25 * torch.tensor(2 / 3).log())
        + 0.5 * 0.5 * torch.tensor(16 / 15).log(),
    }
    for direction, value in expected.items():
        torch.testing.assert_close(kl_divergence(hidden, weight, teacher, weight, direction=direction), value[None])


def test_forward_is_the_cross_entropy_less_the_teachers_own():
    student, weight, teacher, teacher_weight = case()
    p = (teacher @ teacher_weight.T).softmax(1)
    everything = torch.arange(VOCABULARY).expand(COUNT, -1)
    cross = -token_log_likelihood(student, weight, everything, p)
    got = kl_divergence(student, weight, teacher, teacher_weight)
    torch.testing.assert_close(got, cross - torch.distributions.Categorical(probs=p).entropy())


@pytest.mark.parametrize(("beta", "other"), [(1e-6, "forward"), (1 - 1e-6, "reverse")])
def test_jensen_shannon_lies_between_the_two(beta, other):
    between, plain = case(), case()
    kl_divergence(*between, direction="jensen_shannon", beta=beta).sum().div(1e-6).backward()
    kl_divergence(*plain, direction=other).sum().backward()
    torch.testing.assert_close(between[0].grad, plain[0].grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_far_apart_and_sure_stays_finite(direction):
    """Probabilities of both underflow in float32, on the other's favourites too."""
    logits = torch.tensor([[300.0, -300.0, 0.0], [0.0, 200.0, -900.0]])
    opposite = torch.tensor([[-300.0, 300.0, 0.0], [0.0, 200.0, 900.0]])
    tensors = [logits.clone().requires_grad_(), torch.eye(3).requires_grad_(), opposite, torch.eye(3)]
    double = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    got = kl_divergence(*tensors, direction=direction)
    log_q, log_p = double[0].log_softmax(1), double[2].log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).double().log()
    expected = {
        "forward": (log_p.exp() * (log_p - log_q)).sum(1),
        "reverse": (log_q.exp() * (log_q - log_p)).sum(1),
        "jensen_shannon": 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1),
    }[direction]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(tensors[0].grad.double(), double[0].grad, rtol=1e-5, atol=1e-5)


def test_masked_tokens_are_not_even_looked_at():
    student, weight, teacher, teacher_weight = case()
    mask = (torch.arange(COUNT) % 3 == 0).double()
    broken = [t.detach().masked_fill(mask[:, None] == 0, float("nan")) for t in (student, teacher)]
    got = kl_divergence(broken[0].requires_grad_(), weight, broken[1], teacher_weight, token_weights=mask)
    got.sum().backward()
    expected = kl_divergence(*case(), token_weights=mask)
    torch.testing.assert_close(got.detach(), expected.detach())
    assert not broken[0].grad[mask == 0].any()


def test_the_teacher_gets_no_gradient():
    tensors = [tensor.detach().requires_grad_() for tensor in case()]
    kl_divergence(*tensors, token_weights=torch.ones(COUNT)).sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [False, False, True, True]


@pytest.mark.parametrize("teacher_type", [torch.bfloat16, torch.float32])
def test_half_precision_sums_in_float32(teacher_type):
    tensors = case(torch.float32)
    expected = kl_divergence(*(tensor.detach().double() for tensor in tensors))
    student, weight, teacher, teacher_weight = tensors
    halved = [t.detach().bfloat16().requires_grad_() for t in (student, weight)]
    got = kl_divergence(*halved, teacher.to(teacher_type), teacher_weight.to(teacher_type), chunk=8)
    got.sum().backward()
    assert got.dtype == torch.float32
    assert halved[0].grad.dtype == torch.bfloat16
    assert (got.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"direction": "sideways"}, "direction"),
        ({"beta": 1.0}, "beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"teacher_softcap": -1.0}, "softcap"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_arguments_out_of_range_are_refused(named, message):
    with pytest.raises(ValueError, match=message):
        kl_divergence(*case(), **named)


def test_heads_between_which_there_is_no_divergence_are_refused():
    student, weight, teacher, teacher_weight = case()
    with pytest.raises(ValueError, match="student has 41 ids, the teacher 40: the reverse divergence is infinite"):
        kl_divergence(student, weight, teacher, teacher_weight[1:], direction="reverse")
    with pytest.raises(ValueError, match="teacher has 41 ids, the student 40"):
        kl_divergence(student, weight[1:], teacher, teacher_weight)


def test_tokens_with_different_factors_want_no_token_weights():
    got = kl_divergence(*case(), token_weights=torch.ones(COUNT))
    with pytest.raises(RuntimeError, match="leave token_weights out"):
        (got * torch.arange(COUNT)).sum().backward()


# ---- what is kept of a teacher ----


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 1.5}], ids=["plain", "capped"])
@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_parts_are_the_dense_distributions(k, options):
    hidden, weight, *_ = (tensor.detach() for tensor in case())
    labels = torch.randint(VOCABULARY, (COUNT,), generator=torch.Generator().manual_seed(3))
    logits = hidden @ weight.T
    if options:
        logits = 2.0 * torch.tanh(logits / 2.0) / 1.5
    p = logits.softmax(1)
    ids, log_p = top_log_probabilities(hidden, weight, labels, k, chunk=7, **options)
    assert log_p.shape == (COUNT, k + 2)
    torch.testing.assert_close(log_p[:, :k].exp(), p.topk(k).values)
    torch.testing.assert_close(p.gather(1, ids), p.topk(k).values)
    for row, label in enumerate(labels.tolist()):
        listed = set(ids[row].tolist())
        apart = 0.0 if label in listed else float(p[row, label])
        rest = sum(float(p[row, other]) for other in set(range(VOCABULARY)) - listed - {label})
        assert log_p[row, k:].exp().tolist() == pytest.approx([apart, rest], abs=1e-12)


def test_more_ids_than_there_are_cannot_be_kept():
    hidden, weight, *_ = case()
    with pytest.raises(ValueError, match="k must lie in"):
        top_log_probabilities(hidden, weight, torch.zeros(COUNT, dtype=torch.int64), VOCABULARY + 1)


STEP = """
from lightning_llm.losses.likelihood import kl_divergence

def step(count, vocabulary):
    heads = [torch.randn(vocabulary, width).mul_(0.02) for _ in range(2)]
    states = [torch.randn(count, width) for _ in range(2)]
    before = status("VmRSS")
    token_weights = torch.ones(count) if "MODE" == "forward" else None
    student = [t.requires_grad_() for t in (states[0], heads[0])]
    options = {"direction": "jensen_shannon", "token_weights": token_weights}
    kl_divergence(*student, states[1], heads[1], **options).sum().backward()
    return before
"""


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_memory_above_the_weights_gradient(mode, peak_of):
    """Dense logits of 2,048 tokens would take 0.5 GB for each of the two, and as much for their gradient."""
    assert peak_of(STEP.replace("MODE", mode), 2048, vocabulary=65_536, width=16) < 350
