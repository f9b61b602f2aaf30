"""A batch's segments as few calls of a kernel for equally long rows: which segments are stacked, which are cut.

A row is a run of queries, the keys before its first query, and its queries' own keys. A segment without window is one
row. A row that needs a mask, because keys lie before its queries or because of a window, is cut into blocks of queries,
each a row that starts at the first key its queries see: so the cost follows what is attended, and no mask is long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_llm.models.attention.segments import Segments

CALL_COST = 6_000  # what one more kernel call costs, in pairs of query and key; measured on a CPU, four heads of 32
SHORTEST_BLOCK, LONGEST_BLOCK = 64, 512  # queries of a row with a mask; between them as many as the window


@dataclass(frozen=True)
class Call:
    """One call: `rows` rows, padded to the same number of queries and of keys."""

    rows: int
    queries: int  # of each row
    keys: int
    mask: Tensor | None  # added to the scores, [rows or 1, 1, queries, keys]; None: causal, as many keys as queries


@dataclass(frozen=True)
class Calls:
    """A batch's calls, and how its T tokens go in and out of them."""

    calls: list[Call]
    query_index: Tensor  # token that each query is, padding included
    key_index: Tensor
    inverse: Tensor | None  # [T] which query a token is; None: the tokens lie as the calls want them


@dataclass(frozen=True)
class Rows:
    """Runs of queries and of the keys before them, as tokens of the batch; R each."""

    starts: np.ndarray  # first query
    queries: np.ndarray  # how many
    own_before: np.ndarray  # keys right before the first query
    prefix_ends: np.ndarray  # where the keys before those end
    before: np.ndarray  # keys before the first query: own_before and the prefix's

    def select(self, rows: np.ndarray) -> Rows:
        """Some of the rows, by their numbers or by a mask [R]."""
        return Rows(*(values[rows] for values in vars(self).values()))


def fill_calls(segments: Segments, window: int | None, like: Tensor) -> Calls:
    """Stack rows of like length, in tensors on the device and (masks) of the type of `like`."""
    rows = cut(segments, window)
    calls, query_indices, key_indices = [], [], []
    inverse = np.empty(segments.lengths.sum(), np.int64)
    filled = 0
    has_mask = rows.before > 0
    if window is not None:
        has_mask |= rows.queries > window
    for kind in (~has_mask, has_mask):
        of_kind = np.flatnonzero(kind)
        for part in partition(rows.queries[of_kind], rows.before[of_kind]):
            stacked = rows.select(of_kind[part])
            queries, keys = padded_queries(stacked), padded_keys(stacked)
            is_real = np.arange(queries.shape[1]) < stacked.queries[:, None]
            inverse[queries[is_real]] = filled + np.flatnonzero(is_real)
            filled += queries.size
            query_indices.append(queries)
            key_indices.append(keys)
            mask = mask_of(stacked, window, like) if kind is has_mask else None
            calls.append(Call(len(queries), queries.shape[1], keys.shape[1], mask))
    query_index, key_index = (np.concatenate([i.ravel() for i in x]) for x in (query_indices, key_indices))
    as_they_lie = np.array_equal(query_index, np.arange(len(inverse))) and np.array_equal(key_index, query_index)
    return Calls(
        calls,
        torch.from_numpy(query_index).to(like.device),
        torch.from_numpy(key_index).to(like.device),
        None if as_they_lie else torch.from_numpy(inverse).to(like.device),
    )


def cut(segments: Segments, window: int | None) -> Rows:
    """The batch's rows. A prefix and the continuation right behind it are one sequence."""
    joined = np.flatnonzero((segments.prefixes >= 0) & (segments.prefixes == np.arange(len(segments.prefixes)) - 1))
    lengths, prefix_lengths = segments.lengths.copy(), segments.prefix_lengths
    lengths[joined - 1] += lengths[joined]
    sequences = np.delete(np.arange(len(lengths)), joined)
    lengths, prefix_lengths = lengths[sequences], prefix_lengths[sequences]
    starts = segments.starts[sequences]
    prefix_ends = (segments.starts + segments.lengths)[segments.prefixes[sequences]]

    is_cut = prefix_lengths > 0
    if window is not None:
        is_cut |= lengths > window
    longest = LONGEST_BLOCK if window is None else min(max(window, SHORTEST_BLOCK), LONGEST_BLOCK)
    block = np.where(is_cut, longest, lengths)
    counts = -(-lengths // block)
    sequence = np.repeat(np.arange(len(sequences)), counts)
    firsts = (np.arange(len(sequence)) - np.repeat(counts.cumsum() - counts, counts)) * block[sequence]
    before = firsts + prefix_lengths[sequence]
    if window is not None:
        before = np.minimum(before, window - 1)
    return Rows(
        starts[sequence] + firsts,
        np.minimum(block[sequence], lengths[sequence] - firsts),
        np.minimum(firsts, before),
        prefix_ends[sequence],
        before,
    )


def padded_queries(rows: Rows) -> np.ndarray:
    """[R, queries] tokens, a row's last one repeated: what lies behind it is seen by no real query."""
    offsets = np.arange(rows.queries.max())
    return rows.starts[:, None] + np.minimum(offsets, rows.queries[:, None] - 1)


def padded_keys(rows: Rows) -> np.ndarray:
    """[R, keys] tokens: first the keys before a row's queries, on the left padded by its first one, then its own."""
    offsets = np.arange(-rows.before.max(), 0)
    offsets = np.maximum(offsets, -rows.before[:, None])  # counted from the first query
    is_own = offsets >= -rows.own_before[:, None]
    ends = np.where(is_own, rows.starts[:, None], (rows.prefix_ends + rows.own_before)[:, None])
    return np.hstack((ends + offsets, padded_queries(rows)))


def mask_of(rows: Rows, window: int | None, like: Tensor) -> Tensor:
    """0 where a row's query sees a key, -inf elsewhere: what lies before it, no more than the window, and itself."""
    queries, before = rows.queries.max(), rows.before.max()
    distance = before + np.arange(queries)[:, None] - np.arange(before + queries)
    seen = (distance >= 0)[None]
    if window is not None:
        seen = seen & (distance < window)
    if (rows.before < before).any():
        seen = seen & (np.arange(before + queries) >= before - rows.before[:, None])[:, None]
    mask = torch.zeros(len(seen), 1, *seen.shape[1:], dtype=like.dtype)
    return mask.masked_fill_(torch.from_numpy(~seen).unsqueeze(1), float("-inf")).to(like.device)


def partition(queries: np.ndarray, before: np.ndarray) -> list[np.ndarray]:
    """Indices of rows in groups such that all pairs of query and key, padding included, and calls cost least.

    Rows are ordered by length, longest first; the best cuts of that order follow from those of its beginnings.
    """
    order = np.argsort(-(queries + before), kind="stable")
    count = len(order)
    best, cuts = np.zeros(count + 1), np.zeros(count + 1, int)
    most_queries, most_before = np.zeros(count, int), np.zeros(count, int)  # of a group from here to `end`
    for end in range(1, count + 1):
        last = order[end - 1]
        np.maximum(most_queries[:end], queries[last], out=most_queries[:end])
        np.maximum(most_before[:end], before[last], out=most_before[:end])
        pairs = most_queries[:end] * (most_queries[:end] + most_before[:end])
        costs = best[:end] + CALL_COST + np.arange(end, 0, -1) * pairs
        cuts[end] = costs.argmin()
        best[end] = costs[cuts[end]]
    groups, end = [], count
    while end:
        groups.append(order[cuts[end] : end])
        end = cuts[end]
    return groups[::-1]
