"""Task arithmetic, TIES and DARE against plain formulas, and the streamed threshold against sorting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.merging.largest import RUN, largest_from, runs
from lightning_llm.merging.task_vectors import agreed_mean, dare, task_arithmetic, ties

SHAPES = {"model.embed_tokens.weight": (50, 4), "model.layers.0.mlp.weight": (30, 4), "model.norm.weight": (4,)}


def state(seed, dtype=torch.float64):
    chance = np.random.default_rng(seed)
    sizes = {name: 10.0**-i for i, name in enumerate(SHAPES)}  # parameters move by unlike amounts
    return {n: torch.from_numpy(chance.normal(size=shape) * sizes[n]).to(dtype) for n, shape in SHAPES.items()}


def test_task_arithmetic_adds_and_takes_away():
    init, one, other = state(0), state(1), state(2)
    got = task_arithmetic(init, [one, other], 0.4)
    for name in SHAPES:
        torch.testing.assert_close(got[name], init[name] + 0.4 * (one[name] - init[name] + other[name] - init[name]))
    torch.testing.assert_close(task_arithmetic(init, [one]), one)
    torch.testing.assert_close(task_arithmetic(one, [task_arithmetic(init, [one], -1.0)], -1.0)["model.norm.weight"],
                               3 * one["model.norm.weight"] - 2 * init["model.norm.weight"])  # fmt: skip


def plain_ties(init, states, density, scale):
    """With numpy, over one long vector."""
    flat = [np.concatenate([s[name].numpy().ravel() for name in SHAPES]) for s in (init, *states)]
    trimmed = []
    for vector in (each - flat[0] for each in flat[1:]):
        kept = np.argsort(-np.abs(vector))[: math.ceil(density * vector.size)]
        trimmed.append(np.where(np.isin(np.arange(vector.size), kept), vector, 0.0))
    merged = np.zeros_like(flat[0])
    for i in range(merged.size):
        sign = np.sign(sum(vector[i] for vector in trimmed))
        those = [vector[i] for vector in trimmed if vector[i] and np.sign(vector[i]) == sign]
        merged[i] = np.mean(those) if those else 0.0
    return flat[0] + scale * merged


@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_ties_is_its_algorithm(density):
    init, *states = (state(seed) for seed in range(4))
    got = ties(init, states, density, 0.7)
    flat = np.concatenate([got[name].numpy().ravel() for name in SHAPES])
    np.testing.assert_allclose(flat, plain_ties(init, states, density, 0.7), rtol=1e-12, atol=1e-12)


def test_ties_elects_by_hand():
    vectors = torch.tensor([[1.0, -3.0, 0.0, 2.0], [2.0, 1.0, 0.0, -2.0], [-1.0, 1.0, 5.0, 0.0]])
    assert agreed_mean(vectors).tolist() == [1.5, -3.0, 5.0, 0.0]  # a tie of signs is nobody's
    init, one = state(0), state(1)
    torch.testing.assert_close(ties(init, [one, one], 1.0), one)


VALUES = st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=60)


@given(VALUES, VALUES, st.floats(0.01, 1), st.integers(0, 60), st.integers(0, 60))
def test_the_threshold_is_that_of_sorting(values, other, density, cut, sampled):
    other = (other * 60)[: len(values)]
    passes = []

    def vectors():
        passes.append(True)
        for part in (slice(cut), slice(cut, None)):  # one of them may be empty
            yield torch.tensor(values[part]), -torch.tensor(other[part])

    samples = [torch.tensor(values[:sampled]), torch.tensor(values[:sampled])]  # those of the second may mislead
    wanted = max(math.ceil(density * len(values)), 1)
    expected = [sorted(each, reverse=True)[wanted - 1] for each in (values, other)]
    assert largest_from(vectors, samples, density) == expected
    assert len(passes) <= 4


def test_a_threshold_takes_one_pass_where_a_sample_shows_it():
    passes = []
    vector = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    states = {"a": vector[:10].clone(), "b": vector[10:].view(2, -1).clone()}

    def vectors():
        passes.append(True)
        for block in vector.split(70_001):
            yield (block,)

    sample = torch.cat([entries for [entries] in runs([states])])
    assert len(sample) == len(vector)  # which is short enough
    for density in (1e-5, 0.2, 1.0):
        [found] = largest_from(vectors, [sample], density)
        assert found == vector.abs().sort(descending=True).values[math.ceil(density * len(vector)) - 1]
    assert len(passes) == 3


def test_a_sample_is_short_whatever_the_model(monkeypatch):
    monkeypatch.setattr("lightning_llm.merging.largest.RUNS", 16)
    states = [{"small": torch.zeros(3), "large": torch.arange(RUN * 160.0).view(160, RUN)}, {}]
    states[1] = {name: tensor + 1 for name, tensor in states[0].items()}
    one, other = (torch.cat(parts) for parts in zip(*runs(states), strict=True))
    assert len(one) == 3 + 16 * RUN
    assert torch.equal(other, one + 1)
    assert one[3::RUN].tolist() == [RUN * row for row in range(0, 160, 10)]


def test_dare_keeps_a_share_and_the_mean():
    zero, one = {"w": torch.zeros(100_000)}, {"w": torch.full((100_000,), 2.0)}
    got = dare(zero, [one], 0.1, seed=1)["w"]
    assert sorted(set(got.tolist())) == [0.0, pytest.approx(20.0)]
    assert (got != 0).float().mean() == pytest.approx(0.1, abs=0.005)
    assert got.mean() == pytest.approx(2.0, abs=0.1)
    torch.testing.assert_close(dare(zero, [one, one], 1.0, 0.5)["w"], one["w"])


def test_dare_draws_by_seed_name_and_place():
    init, one = state(0), state(1)
    same, other = dare(init, [one], 0.5, seed=3), dare(init, [one], 0.5, seed=4)
    torch.testing.assert_close(same, dare(init, [one], 0.5, seed=3), rtol=0, atol=0)
    alone = {name: one[name] for name in reversed(list(one))}  # another order of reading
    torch.testing.assert_close(dict(sorted(dare(init, [alone], 0.5, seed=3).items())), dict(sorted(same.items())))
    assert not torch.equal(same["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    both = dare(init, [one, one], 0.5, 0.5, seed=3)["model.embed_tokens.weight"]
    assert not torch.equal(both, same["model.embed_tokens.weight"])  # each model has a mask of its own


@pytest.mark.parametrize(("merge", "density"), [(ties, 0.0), (dare, 1.5)])
def test_densities_that_are_none(merge, density):
    with pytest.raises(ValueError, match="density must"):
        merge(state(0), [state(1)], density)
