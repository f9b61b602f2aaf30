"""Online merging of one step: the paper's equations entry by entry, and moments of the random one."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.merging.online import consensus, dropped, largest, ondare, onties, seeded


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def plain_consensus(a, b):
    """Eq. 7 with its indicators."""
    if np.sign(a) == np.sign(b):
        return a + b
    return a * (abs(a) >= abs(b)) + b * (abs(b) >= abs(a))


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, -1.0, 1e-200, -3.5]), st.sampled_from([0.0, -1.0, 2.0, -1e-200]))))
def test_consensus_is_equation_7(pairs):
    a, b = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in (0, 1))
    assert consensus(a, b).tolist() == [plain_consensus(*pair) for pair in pairs]
    assert torch.equal(consensus(a, b), consensus(b, a))


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_onties_is_equations_5_and_6(rate):
    delta, tau, alpha = draw(7, 9) * 1e-3, draw(7, 9, seed=1), 0.01

    def top(values):
        order = np.argsort(-np.abs(values.numpy().ravel()))[: int(np.ceil(rate * values.numel()))]
        return np.where(np.isin(np.arange(values.numel()), order), values.numpy().ravel(), 0.0)

    u, v = (1 - alpha) * top(delta), alpha * top(tau)
    expected = [plain_consensus(one, other) for one, other in zip(u, v, strict=True)]
    got = onties(delta, tau, alpha=alpha, reserve_rate=rate)
    np.testing.assert_allclose(got.flatten().numpy(), expected, rtol=1e-12)


def test_the_largest_by_hand():
    assert largest(torch.tensor([1.0, -4.0, 2.0, 0.5]), 0.5).tolist() == [0.0, -4.0, 2.0, 0.0]
    assert largest(torch.tensor([1.0, -4.0]), 1e-9).tolist() == [0.0, -4.0]  # one entry at least
    assert largest(torch.empty(0), 0.5).shape == (0,)


@pytest.mark.parametrize("rescale", [False, True])
def test_ondare_has_the_mean_of_equation_3(rescale):
    """E = ((1 - a) d + a tau) times the rate, or without it where what is kept is rescaled."""
    delta, tau, alpha, rate = torch.full((200_000,), 3.0), torch.full((200_000,), -1.0), 0.25, 0.1
    got = ondare(delta, tau, alpha=alpha, reserve_rate=rate, generator=seeded(0, "x"), rescale=rescale)
    factor = 1 / rate if rescale else 1.0
    values = {0.0, 0.75 * 3 * factor, -0.25 * factor, (0.75 * 3 - 0.25) * factor}  # masks are drawn apart
    assert {round(value, 4) for value in set(got.tolist())} == {round(value, 4) for value in values}
    assert got.mean() == pytest.approx((0.75 * 3 - 0.25) * rate * factor, rel=0.05)


def test_nothing_dropped_is_plain_arithmetic():
    delta, tau = draw(5, 4), draw(5, 4, seed=1)
    got = ondare(delta, tau, alpha=0.2, reserve_rate=1.0, generator=seeded(0, "x"))
    torch.testing.assert_close(got, 0.8 * delta + 0.2 * tau)
    alone = ondare(delta, tau, alpha=0.0, reserve_rate=1.0, generator=seeded(0, "x"))
    assert torch.equal(alone, delta)
    assert torch.equal(onties(delta, tau, alpha=0.0, reserve_rate=1.0), delta)


def test_dropping_without_rescaling_is_a_mask():
    vector = torch.randn(10_000, generator=seeded(0, "vector"))
    kept = dropped(vector, 0.3, seeded(0, "mask"), rescale=False)
    assert set((kept / vector).tolist()) == {0.0, 1.0}
    torch.testing.assert_close(dropped(vector, 0.3, seeded(0, "mask"), rescale=True), kept / 0.3)
