"""Soft top-k against the closed form over sorted scores, finite differences, and coordinate descent."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_llm.losses.soft_top_k import soft_top_k

SCORES = arrays("float64", st.tuples(st.integers(1, 3), st.integers(2, 12)), elements=st.floats(-20, 20))


def closed_form(scores: list[float], k: float, temperature: float) -> list[float]:
    """By trying how many of the largest are 1: the others share what is left of the budget like a softmax."""
    largest = sorted(scores, reverse=True)
    for full in range(len(scores)):
        rest = largest[full:]
        top = rest[0]
        total = math.fsum(math.exp((score - top) / temperature) for score in rest)
        if (k - full) / total <= 1 + 1e-12:  # the largest of the others stays below 1
            share = (k - full) / total
            return [min(1.0, share * math.exp((score - top) / temperature)) for score in scores]
    return [1.0] * len(scores)


@given(SCORES, st.floats(0.02, 0.98), st.floats(0.05, 10))
def test_it_is_the_closed_form_and_keeps_the_budget(scores, share, temperature):
    k = share * scores.shape[1]
    found = soft_top_k(torch.tensor(scores), k, temperature)
    expected = [closed_form(row, k, temperature) for row in scores.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.sum(1), torch.full((len(scores),), k, dtype=torch.float64), rtol=1e-9, atol=0)
    assert ((found > -1e-15) & (found <= 1)).all()


def test_it_is_where_coordinate_descent_goes():
    """The paper's own iteration (CoDA, section 3.2), run to its end."""
    scores = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k, temperature = 16, 0.3
    bound = -scores.relu()
    for _ in range(5000):
        shift = temperature * (math.log(k) - torch.logsumexp((scores + bound) / temperature, 0))
        bound = -(scores + shift).relu()
    expected = torch.exp((scores + shift + bound) / temperature)
    torch.testing.assert_close(soft_top_k(scores, k, temperature), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 0.4, 3.0])
def test_the_gradient_is_that_of_finite_differences(temperature):
    scores = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    masks = soft_top_k(scores, 4, temperature)
    assert (masks == 1).any() == (temperature < 1)
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, 4, temperature), scores, eps=1e-7, atol=1e-5)
    [gradient] = torch.autograd.grad(masks.sum(), scores)  # the budget is constant
    assert gradient.abs().max() < 1e-12


def test_limits_of_the_temperature():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.1, -5.0]])
    torch.testing.assert_close(soft_top_k(scores, 2, 1e-3), torch.tensor([[1.0, 0, 1, 0, 0]]))
    torch.testing.assert_close(soft_top_k(scores, 2, 1e6), torch.full((1, 5), 0.4))
    torch.testing.assert_close(soft_top_k(scores, 2.5, 1e-3), torch.tensor([[1.0, 0, 1, 0.5, 0]]))


def test_by_hand():
    """eps = 1 / log 2, so that scores 0, 1, 2 are powers of two: 4a, 2a, a add up to 3 / 2 at a = 3 / 14, or with one
    full and the others at 2a + a = 1."""
    temperature = 1 / math.log(2)
    scores = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    for k, expected in ((0.7, [0.1, 0.2, 0.4]), (2.0, [1 / 3, 2 / 3, 1.0])):
        found = soft_top_k(scores, k, temperature)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_whole_budget_keeps_all_and_teaches_nothing():
    scores = torch.randn(2, 7, requires_grad=True)
    masks = soft_top_k(scores, 7, 0.5)
    assert torch.equal(masks, torch.ones(2, 7))
    masks.square().sum().backward()
    assert torch.equal(scores.grad, torch.zeros(2, 7))


def test_large_scores_overflow_nothing():
    scores = torch.tensor([[3e4, -3e4, 2.9e4, 0.0]], requires_grad=True)
    masks = soft_top_k(scores, 2, 0.01)
    masks[0, 0].backward()
    torch.testing.assert_close(masks.detach(), torch.tensor([[1.0, 0, 1, 0]]))
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (5, 1.0), (2, 0.0), (2, float("nan"))])
def test_what_is_no_budget_is_refused(k, temperature):
    with pytest.raises(ValueError, match=r"k lies in \(0, 4\]|temperature must be"):
        soft_top_k(torch.zeros(4), k, temperature)
