"""Spherical interpolation against WARP's formula, layer by layer, and against its two lemmas."""

import math

import numpy as np
import pytest
import torch

from lightning_llm.merging.spherical import slerp, slerp_task_vectors

SHAPES = {
    "model.embed_tokens.weight": (6, 4),
    "model.layers.0.mlp.up_proj.weight": (3, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.10.mlp.up_proj.weight": (3, 4),
    "model.norm.weight": (4,),
}
LAYERS = [  # one angle each
    ["model.embed_tokens.weight"],
    ["model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"],
    ["model.layers.10.mlp.up_proj.weight"],
    ["model.norm.weight"],
]


def state(seed):
    chance = np.random.default_rng(seed)
    return {name: torch.from_numpy(chance.normal(size=shape)) for name, shape in SHAPES.items()}


def flat(values, layer):
    return np.concatenate([values[name].numpy().ravel() for name in layer])


def plain_arc(one, other, t):
    angle = math.acos(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    return math.sin((1 - t) * angle) / math.sin(angle) * one + math.sin(t * angle) / math.sin(angle) * other


@pytest.mark.parametrize("t", [0.5, 0.2])
def test_two_task_vectors_are_the_formula(t):
    init, one, other = state(0), state(1), state(2)
    got = slerp_task_vectors(init, [one, other], t)
    for layer in LAYERS:
        start = flat(init, layer)
        expected = start + plain_arc(flat(one, layer) - start, flat(other, layer) - start, t)
        np.testing.assert_allclose(flat(got, layer), expected, rtol=1e-12, atol=1e-12)


def test_more_are_taken_one_after_the_other():
    init, *states = (state(seed) for seed in range(5))
    got = slerp_task_vectors(init, states)
    for layer in LAYERS:
        start = flat(init, layer)
        merged = flat(states[0], layer) - start
        for m, each in enumerate(states[1:], start=2):
            merged = plain_arc(merged, flat(each, layer) - start, 1 / m)
        np.testing.assert_allclose(flat(got, layer), start + merged, rtol=1e-10, atol=1e-12)


def test_weights_themselves_are_the_case_of_a_start_at_zero():
    one, other = state(1), state(2)
    zero = {name: torch.zeros_like(tensor) for name, tensor in one.items()}
    torch.testing.assert_close(slerp(one, other, 0.3), slerp_task_vectors(zero, [one, other], 0.3))


def test_ends_and_identity():
    init, one, other = state(0), state(1), state(2)
    torch.testing.assert_close(slerp_task_vectors(init, [one, other], 0.0), one)
    torch.testing.assert_close(slerp_task_vectors(init, [one, other], 1.0), other)
    torch.testing.assert_close(slerp_task_vectors(init, [one, one], 0.5), one)
    torch.testing.assert_close(slerp_task_vectors(init, [one]), one)
    torch.testing.assert_close(slerp_task_vectors(init, [one, other], 0.3), slerp_task_vectors(init, [other, one], 0.7))
    torch.testing.assert_close(slerp_task_vectors(init, [init, init]), init)  # nothing was learnt: no angle
    torch.testing.assert_close(slerp_task_vectors(init, [one, init], 0.25)["model.norm.weight"],
                               0.75 * one["model.norm.weight"] + 0.25 * init["model.norm.weight"])  # fmt: skip


def test_an_arc_keeps_the_length_that_a_line_loses():
    """Lemma 1 and lemma 2 of WARP: at a right angle the mean of two is 0.707 as long."""
    init, one, other = ({"w": torch.tensor(v, dtype=torch.float64)} for v in ([0.0, 0.0], [2.0, 0.0], [0.0, 2.0]))
    torch.testing.assert_close(
        slerp_task_vectors(init, [one, other], 0.5)["w"], torch.full((2,), math.sqrt(2.0)).double()
    )
    assert slerp_task_vectors(init, [one, other], 0.1)["w"].norm() == pytest.approx(2.0)
    opposite = {"w": -one["w"]}
    torch.testing.assert_close(slerp_task_vectors(init, [one, opposite], 0.25)["w"], 0.5 * one["w"])  # no way round


def test_places_that_are_none():
    init, *states = (state(seed) for seed in range(4))
    with pytest.raises(ValueError, match=r"3 have t = 1 / 3, got 0\.5"):
        slerp_task_vectors(init, states, 0.5)
    torch.testing.assert_close(slerp_task_vectors(init, states, 1 / 3), slerp_task_vectors(init, states))
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\], got 2"):
        slerp(states[0], states[1], 2.0)
