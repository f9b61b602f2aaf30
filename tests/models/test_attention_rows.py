"""What stacking and cutting rows cost, and that the rows' pairs of query and key are those of the batch."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.models.attention import Segments, attention, rows, sdpa
from lightning_llm.models.attention.rows import CALL_COST, LONGEST_BLOCK, SHORTEST_BLOCK, cut, fill_calls

GROUPS = st.lists(st.tuples(st.integers(1, 300), st.lists(st.integers(1, 80), max_size=3)), min_size=1)


def segments_of(groups: list[tuple[int, list[int]]]) -> Segments:
    lengths, prefixes = [], []
    for prompt, responses in groups:
        prefixes += [-1] + [len(lengths)] * len(responses)
        lengths += [prompt, *responses]
    return Segments(lengths, prefixes)


def cost(segments: Segments, window: int | None) -> int:
    """Pairs of query and key in all calls, padding included, and the calls themselves."""
    calls = fill_calls(segments, window, torch.zeros(0)).calls
    return sum(call.rows * call.queries * call.keys + CALL_COST for call in calls)


@settings(max_examples=50)
@given(GROUPS)
def test_stacking_never_costs_more_than_a_loop_over_segments(groups):
    pairs = sum(prompt**2 + sum(n * (n + prompt) for n in responses) for prompt, responses in groups)
    pairs += sum(responses[0] * prompt for prompt, responses in groups if responses)  # with its prompt one square
    segments = segments_of(groups)
    assert cost(segments, None) <= pairs + CALL_COST * len(segments.lengths)


@pytest.mark.parametrize("window", [16, 128, 1000])
def test_a_window_makes_the_cost_linear_in_the_length(window):
    block = min(max(window, SHORTEST_BLOCK), LONGEST_BLOCK)
    length = 40 * block
    assert cost(Segments([length], [-1]), window) <= length * (block + window) + 2 * CALL_COST
    assert cost(Segments([length], [-1]), window) < cost(Segments([length], [-1]), None) / 10


def test_a_window_as_long_as_the_segments_costs_nothing():
    segments = Segments([100, 60, 20], [-1, -1, 1])
    assert cost(segments, 100) == cost(segments, None)


def test_no_mask_is_longer_than_a_block():
    calls = fill_calls(Segments([3000, 2000, 1500], [-1, 0, 0]), None, torch.zeros(0)).calls
    assert max(call.mask.shape[-2] for call in calls if call.mask is not None) == LONGEST_BLOCK
    assert all(call.mask is not None or call.queries == 5000 for call in calls)  # the prompt and its first response


@settings(max_examples=100)
@given(GROUPS, st.one_of(st.none(), st.integers(1, 400)))
def test_rows_hold_each_query_once_and_the_keys_it_sees(groups, window):
    segments = segments_of(groups)
    parts = cut(segments, window)
    seen = np.zeros(segments.lengths.sum(), int)
    for start, queries, own, end, before in zip(*vars(parts).values(), strict=True):
        for query in range(start, start + queries):
            own_keys = own + query - start + 1
            keys = own_keys + before - own
            assert not seen[query]
            seen[query] = keys if window is None else min(keys, window)
            assert window is None or keys >= seen[query]
        if before > own:  # then all that lies between its prefix and its queries is there
            assert start - own in segments.starts
            assert end in segments.starts
    expected = np.concatenate([
        np.arange(1, length + 1) + before
        for length, before in zip(segments.lengths, segments.prefix_lengths, strict=True)
    ])  # fmt: skip
    np.testing.assert_array_equal(seen, expected if window is None else np.minimum(expected, window))


def test_a_like_length_costs_one_call_and_no_copy():
    calls = fill_calls(Segments([128] * 16, [-1] * 16), None, torch.zeros(0))
    assert [call.rows for call in calls.calls] == [16]
    assert calls.inverse is None


def test_the_calls_of_a_batch_are_chosen_once_for_each_window():
    segments = Segments([4, 2], [-1, 0])
    with mock.patch.object(sdpa, "fill_calls", wraps=rows.fill_calls) as chosen:
        for window in (None, 3, None, 3):
            attention(torch.randn(6, 2, 4), torch.randn(6, 1, 4), torch.randn(6, 1, 4), segments, window=window)
    assert chosen.call_count == 2
    np.testing.assert_array_equal(segments.starts, [0, 4])
