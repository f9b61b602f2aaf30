"""Averages against plain formulas in float64, and what must hold for any models."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.merging.averaging import ema, follow, linear, liti
from lightning_llm.merging.states import LazyState

SHAPES = {"model.embed_tokens.weight": (5, 3), "model.layers.0.mlp.weight": (2, 3), "model.norm.weight": (3,)}


def state(seed, dtype=torch.float64):
    chance = np.random.default_rng(seed)
    return {name: torch.from_numpy(chance.normal(size=shape)).to(dtype) for name, shape in SHAPES.items()}


def same(got, expected, **tolerances):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], torch.as_tensor(tensor), **tolerances)


def test_linear_is_the_weighted_sum():
    a, b, c = (state(seed) for seed in range(3))
    plain = {name: 0.5 * a[name].numpy() + 0.2 * b[name].numpy() + 0.3 * c[name].numpy() for name in SHAPES}
    same(linear([a, b, c], [0.5, 0.2, 0.3]), plain)
    same(linear([a, b, c]), {name: np.mean([s[name].numpy() for s in (a, b, c)], axis=0) for name in SHAPES})


@given(weight=st.floats(0, 1))
def test_linear_does_not_mind_the_order_and_keeps_what_is_common(weight):
    a, b = state(0), state(1)
    same(linear([a, b], [weight, 1 - weight]), linear([b, a], [1 - weight, weight]))
    same(linear([a, a], [weight, 1 - weight]), a)


def test_ema_and_liti_are_interpolations():
    a, b = state(0), state(1)
    same(ema(a, b, 0.01), {name: 0.99 * b[name] + 0.01 * a[name] for name in SHAPES})
    same(liti(a, b, 0.3), {name: 0.7 * a[name] + 0.3 * b[name] for name in SHAPES})
    for move in (ema(a, b, 0.0), liti(b, a, 0.0), ema(b, a, 1.0)):
        same(move, b, rtol=0, atol=0)


def test_an_average_that_follows_in_place_is_the_same():
    states = [state(seed) for seed in range(7)]
    mean, exponential = ({name: tensor.clone() for name, tensor in states[0].items()} for _ in range(2))
    expected = states[0]
    for count, each in enumerate(states[1:], start=2):
        follow(mean, each, 1 / count)
        follow(exponential, each, 0.25)
        expected = ema(each, expected, 0.25)
    same(mean, linear(states))
    same(exponential, expected, rtol=0, atol=0)
    half = {"w": torch.tensor([1.0])}
    follow(half, {"w": torch.tensor([1 + 2**-7], dtype=torch.bfloat16)}, 0.01)  # kept in fp32, whatever comes
    assert half["w"].item() == pytest.approx(1 + 0.01 * 2**-7, rel=1e-7)


def test_many_small_steps_add_up_in_bf16_models():
    """A bf16 average of 1 and 1 + 1/256 would stay 1: the average is kept in fp32."""
    one, more = {"w": torch.tensor([1.0])}, {"w": torch.tensor([1 + 2**-7], dtype=torch.bfloat16)}
    assert ema(more, one, 0.01)["w"].item() == pytest.approx(1 + 0.01 * 2**-7, rel=1e-7)
    half = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}
    thirds = linear([half, half, half])["w"]
    assert (thirds.dtype, thirds.item()) == (torch.bfloat16, 1.0)


def test_called_it_computes_lazily_it_waits():
    live = state(0)
    now, later = linear([live, live]), linear.lazily([live, live])
    assert (type(now), type(later), len(later)) == (dict, LazyState, 3)
    expected = {name: tensor.clone() for name, tensor in live.items()}
    for tensor in live.values():
        tensor.zero_()
    same(now, expected)
    assert not later["model.norm.weight"].any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a, b: linear([]), "there is no state"),
        (lambda a, b: linear([a, {"other": b["model.norm.weight"]}]), "state 1 and state 0 are of different models"),
        (lambda a, b: linear([{"w": torch.ones(2, 3)}, {"w": torch.ones(3, 2)}]), r"w is \[3, 2\], and \[2, 3\] in"),
        (lambda a, b: liti({"w": torch.ones(4)}, {"w": torch.ones(1)}, 0.5), r"w is \[1\], and \[4\] in state 0"),
        (lambda a, b: linear([a, b], [float("nan"), 1.0]), "weights must add up to 1, got nan"),
        (lambda a, b: linear([a, b], [0.5, 0.6]), "weights must add up to 1, got 1.1"),
        (lambda a, b: linear([a, b], [1.0]), "one for each of 2 models, got 1"),
        (lambda a, b: ema(a, b, 1.5), r"mu must lie in \[0, 1\], got 1.5"),
        (lambda a, b: liti(a, b, -0.1), r"eta must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_averaged(call, says):
    with pytest.raises(ValueError, match=says):
        call(state(0), state(1))
