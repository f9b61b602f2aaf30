"""Shares add up at any time, and each epoch of a stream is a permutation that can be entered anywhere."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.data import mixture
from lightning_llm.data.mixture import Mixture, SourceStream
from lightning_llm.settings import UserError

WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 10), min_size=1)


@given(first=WEIGHTS, second=WEIGHTS, at=st.floats(0.01, 0.99), total=st.integers(1, 10**13), data=st.data())
def test_sources_together_give_what_the_stage_consumes(first, second, at, total, data):
    names = sorted(set(first) | set(second))
    ramps = {n: [{"at": 0, "value": first.get(n, 0)}, {"at": at, "value": second.get(n, 0)}] for n in names}
    shares = Mixture(ramps, total)
    points = sorted(data.draw(st.lists(st.integers(0, total), max_size=10)))
    for tokens in points:
        given_ = sum(shares.target(name, tokens) for name in names)
        assert tokens - len(names) - 1e-9 * total <= given_ <= tokens + 1e-9 * total
    for name in names:
        assert all(shares.target(name, a) <= shares.target(name, b) for a, b in pairwise(points))


def test_a_weight_ramp_by_hand():
    shares = Mixture({"web": 1.0, "math": [{"at": 0, "value": 1}, {"at": 0.5, "value": 3}]}, 1000)
    assert [shares.target("web", t) for t in (0, 500, 1000)] == [0, 250, 375]
    assert [shares.target("math", t) for t in (0, 500, 600, 1000)] == [0, 250, 325, 625]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1.0}, r"a\.weight: is negative"),
        ({"a": 0.0}, "no weight from 0 of the stage on"),
        ({"a": [{"at": 0, "value": 1}, {"at": 0.5, "value": 0}]}, r"from 0\.5"),
        ({"a": [{"at": 1, "value": 1}]}, r"a\.weight: a ramp starts at 0"),
    ],
)
def test_weights_that_make_no_mixture_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(weights, 100)


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(mixture, "BLOCK_UNITS", 4)


@pytest.mark.usefixtures("_small_blocks")
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=60)
def test_every_epoch_is_a_permutation_that_can_be_entered_anywhere(lengths, seed, data):
    stream = SourceStream("s", np.array(lengths), seed)
    walked = list(islice(stream.units_from(0), 3 * len(lengths)))
    position = 0
    for unit, start in walked:  # the stream has no gaps
        assert start == position
        position += lengths[unit]
    for epoch in range(3):
        units = [unit for unit, _ in walked[epoch * len(lengths) : (epoch + 1) * len(lengths)]]
        assert sorted(units) == list(range(len(lengths)))
    entry = data.draw(st.integers(0, position - 1))
    covering = max(i for i, (_, start) in enumerate(walked) if start <= entry)
    again = SourceStream("s", np.array(lengths), seed)
    expected = walked[covering:]
    assert list(islice(again.units_from(entry), len(expected))) == expected
    assert again.units_before(entry) == sum(start < entry for _, start in walked)


def test_order_depends_on_seed_epoch_and_name_alone():
    def order(name: str, seed: int, epoch: int) -> list[int]:
        stream = SourceStream(name, np.ones(50, int), seed)
        return [unit for unit, _ in islice(stream.units_from(50 * epoch), 50)]

    orders = [order("a", 0, 0), order("a", 0, 1), order("a", 1, 0), order("b", 0, 0)]
    assert len({tuple(o) for o in orders}) == 4
    assert order("a", 0, 1) == orders[1]


@pytest.mark.usefixtures("_small_blocks")
def test_a_block_of_a_sorted_source_is_a_fair_sample():
    stream = SourceStream("s", np.ones(400, int), 0)
    kinds = Counter(unit // 100 for unit, _ in islice(stream.units_from(0), 40))  # four kinds, one after the other
    assert all(kinds[kind] >= 4 for kind in range(4))
