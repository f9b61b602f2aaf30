"""What variable-length kernels and FlexAttention are handed, carried out here by plain attention."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.models.attention import Segments
from lightning_llm.models.attention.flex import TILE, block_mask, tiles
from lightning_llm.models.attention.ranges import ranges_of, window_size

GROUPS = st.lists(st.tuples(st.integers(1, 200), st.lists(st.integers(1, 80), max_size=3)), min_size=1, max_size=8)
WINDOWS = st.one_of(st.none(), st.integers(1, 300))


def segments_of(groups: list[tuple[int, list[int]]]) -> Segments:
    lengths, prefixes = [], []
    for prompt, responses in groups:
        prefixes += [-1] + [len(lengths)] * len(responses)
        lengths += [prompt, *responses]
    return Segments(lengths, prefixes)


def pairs(segments: Segments, window: int | None) -> np.ndarray:
    """[T, T] bool: which token sees which, from the definition."""
    segment = np.repeat(np.arange(len(segments.lengths)), segments.lengths)
    inside = np.arange(len(segment)) - segments.starts[segment]
    position = inside + segments.prefix_lengths[segment]
    distance = position[:, None] - position
    related = (segment[:, None] == segment) | (segments.prefixes[segment][:, None] == segment)
    return related & (distance >= 0) & (distance < (window or len(segment)))


def kernel_pairs(segments: Segments, window: int | None) -> np.ndarray:
    """[T, T] bool: what flash attention's documentation says that a kernel makes of our ranges.

    Query i of a range sees its keys from i + keys - queries - left to i + keys - queries + right, both inclusive.
    """
    ranges, tokens = ranges_of(segments, torch.device("cpu")), int(segments.lengths.sum())
    left, right = window_size(window)
    key_of = np.arange(tokens) if ranges.key_index is None else ranges.key_index.numpy()
    seen = np.zeros((tokens, tokens), bool)
    of_queries, of_keys = ranges.cu_seqlens_q.tolist(), ranges.cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(of_queries, of_queries[1:], of_keys, of_keys[1:], strict=False):
        for i in range(q1 - q0):
            middle = i + (k1 - k0) - (q1 - q0)
            first = 0 if left < 0 else max(middle - left, 0)
            seen[q0 + i, key_of[k0 + first : k0 + middle + right + 1]] = True
    return seen


@settings(max_examples=100)
@given(GROUPS, WINDOWS)
def test_ranges_and_their_window_are_the_batch(groups, window):
    segments = segments_of(groups)
    np.testing.assert_array_equal(kernel_pairs(segments, window), pairs(segments, window))


def test_ranges_of_pairs_known_by_hand():
    ranges = ranges_of(Segments([3, 2, 1, 4], [-1, 0, 0, -1]), torch.device("cpu"))
    assert ranges.cu_seqlens_q.tolist() == [0, 5, 6, 10]  # the prompt with its first response, the second, a document
    assert ranges.cu_seqlens_k.tolist() == [0, 5, 9, 13]
    assert ranges.cu_seqlens_k.dtype == torch.int32
    assert (ranges.max_seqlen_q, ranges.max_seqlen_k) == (5, 5)
    assert ranges.key_index is not None
    assert ranges.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]


def test_documents_are_not_gathered():
    assert ranges_of(Segments([3, 2], [-1, -1]), torch.device("cpu")).key_index is None


@settings(max_examples=100)
@given(GROUPS, WINDOWS)
def test_tiles_are_those_that_hold_a_pair(groups, window):
    segments = segments_of(groups)
    dense = pairs(segments, window)
    padding = -len(dense) % TILE
    by_tile = np.pad(dense, (0, padding)).reshape(len(dense) // TILE + bool(padding), TILE, -1, TILE)
    np.testing.assert_array_equal(tiles(segments, window), by_tile.any((1, 3)))


@pytest.mark.parametrize("window", [None, 7])
def test_the_function_of_two_tokens_is_the_batch(window):
    segments = segments_of([(20, [5, 9]), (3, []), (150, [1, 30])])
    token = torch.arange(int(segments.lengths.sum()))
    zero = torch.zeros((), dtype=torch.int64)
    seen = block_mask(segments, window, torch.device("cpu")).mask_mod(zero, zero, token[:, None], token)
    np.testing.assert_array_equal(seen.numpy(), pairs(segments, window))
