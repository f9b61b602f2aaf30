"""Causal attention within segments, a continuation also to its prefix: one function, several backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_llm.settings import UserError

CALL_COST = 6_000  # what one more kernel call costs, in pairs of query and key; measured on a CPU, four heads of 32


class Segments:
    """Where a batch's segments lie in its run of T tokens. Made once per batch; backends keep here what they derive."""

    def __init__(self, lengths: list[int], prefixes: list[int]):
        self.lengths = np.array(lengths)
        self.prefixes = np.array(prefixes)  # the segment that this one continues, -1: none
        self.starts = self.lengths.cumsum() - self.lengths
        self.buckets: Buckets | None = None


@dataclass(frozen=True)
class Request:
    """What is asked of a backend."""

    device: str
    window: int | None
    softcap: float | None


class Backend(Protocol):
    def refuses(self, request: Request) -> str | None:
        """Why this backend cannot do what is asked; None: it can."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every token to its segment's tokens up to itself, and to the whole prefix of its segment.

    Args:
        q: queries [T, H, D].
        k, v: keys and values [T, K, D]; H is a multiple of K.
        segments: where the segments lie.
        window: tokens a query sees, itself included; None: all.
        softcap: scores become softcap * tanh(score / softcap); None: as they are.
        scale: factor of the scores; None: 1 / sqrt(D).
        backend: a name in BACKENDS, or "auto".

    Returns:
        [T, H, D].

    Raises:
        UserError: the backend is unknown or cannot do what is asked.
    """
    name = choose_backend(backend, Request(q.device.type, window, softcap))
    return BACKENDS[name](q, k, v, segments, scale)


def choose_backend(backend: str, request: Request) -> str:
    """The name of the backend that serves a request; never another one than was asked for."""
    if backend != "auto" and backend not in BACKENDS:
        raise UserError("compute.attention", f"{backend!r} is not a backend", f"Use auto or {', '.join(BACKENDS)}")
    reasons = {name: BACKENDS[name].refuses(request) for name in (BACKENDS if backend == "auto" else [backend])}
    for name, reason in reasons.items():
        if reason is None:
            return name
    refusals = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    raise UserError("compute.attention", refusals, "Use a model that does not ask for it")


class Sdpa:
    """torch's scaled_dot_product_attention: runs everywhere, costs the sum of squared segment lengths.

    Segments of like length are stacked, so that many short ones take few calls, and padded on the right: there the
    padding lies in the causal future of all real queries and changes nothing.
    """

    def refuses(self, request: Request) -> str | None:
        if request.window is not None:
            return "has no sliding window yet"
        if request.softcap is not None:
            return "has no soft-capping yet"
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor:
        if segments.buckets is None:
            segments.buckets = fill_buckets(segments, q)
        buckets = segments.buckets
        if buckets.inverse is not None:
            q = q.index_select(0, buckets.query_index)
            k, v = k.index_select(0, buckets.key_index), v.index_select(0, buckets.key_index)
        outputs = [
            scaled_dot_product_attention(
                *(x.unflatten(0, (bucket.rows, -1)).transpose(1, 2) for x in parts),
                attn_mask=bucket.mask,
                is_causal=bucket.mask is None,
                scale=scale,
                enable_gqa=True,
            )
            .transpose(1, 2)
            .flatten(0, 1)
            for bucket, *parts in zip(
                buckets.buckets,
                q.split(buckets.query_sizes),
                k.split(buckets.key_sizes),
                v.split(buckets.key_sizes),
                strict=True,
            )
        ]
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return output if buckets.inverse is None else output.index_select(0, buckets.inverse)


BACKENDS: dict[str, Backend] = {"sdpa": Sdpa()}


# ---- which segments are stacked ----


@dataclass(frozen=True)
class Bucket:
    """One call: `rows` sequences, padded to the same number of queries and of keys."""

    rows: int
    mask: Tensor | None  # added to the scores, [rows, 1, queries, keys]; None: causal, as many keys as queries


@dataclass(frozen=True)
class Buckets:
    """A batch's calls, and how its T tokens go in and out of them."""

    buckets: list[Bucket]
    query_sizes: list[int]  # rows of queries that each call takes, padding included
    key_sizes: list[int]
    query_index: Tensor  # token that each query is, padding included
    key_index: Tensor
    inverse: Tensor | None  # [T] which query a token is; None: the tokens lie as the calls want them


def fill_buckets(segments: Segments, like: Tensor) -> Buckets:
    """Stack segments of like length, in tensors on the device and (masks) of the type of `like`.

    A prefix and the continuation right behind it are one causal sequence. Other continuations take their prefix's keys
    before their own, with a mask.
    """
    starts, lengths, prefixes = segments.starts, segments.lengths.copy(), segments.prefixes
    follows = (prefixes >= 0) & (prefixes == np.arange(len(prefixes)) - 1)  # its prefix ends where it begins
    joined = np.flatnonzero(follows)
    lengths[joined - 1] += lengths[joined]
    prefix_lengths = np.where(prefixes >= 0, segments.lengths[prefixes], 0)

    buckets, query_indices, key_indices = [], [], []
    inverse = np.empty(lengths.sum(where=~follows), np.int64)
    filled = 0
    for kind in (prefixes < 0, (prefixes >= 0) & ~follows):
        sequences = np.flatnonzero(kind)
        for part in partition(lengths[sequences], prefix_lengths[sequences]):
            rows = sequences[part]
            queries, is_real = padded(starts[rows], lengths[rows])
            inverse[queries[is_real]] = filled + np.flatnonzero(is_real)
            filled += queries.size
            query_indices.append(queries)
            if prefixes[rows[0]] < 0:
                key_indices.append(queries)
                buckets.append(Bucket(len(rows), None))
            else:
                prefix_keys, is_prefix = padded(starts[prefixes[rows]], prefix_lengths[rows])
                key_indices.append(np.hstack((prefix_keys, queries)))
                buckets.append(Bucket(len(rows), prefix_mask(is_prefix, queries.shape[1], like)))
    query_index, key_index = (np.concatenate([i.ravel() for i in x]) for x in (query_indices, key_indices))
    as_they_lie = np.array_equal(query_index, np.arange(len(inverse))) and np.array_equal(key_index, query_index)
    return Buckets(
        buckets,
        [index.size for index in query_indices],
        [index.size for index in key_indices],
        torch.from_numpy(query_index).to(like.device),
        torch.from_numpy(key_index).to(like.device),
        None if as_they_lie else torch.from_numpy(inverse).to(like.device),
    )


def padded(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of sequences as rows of equal length, the last one repeated, and which of them are real."""
    offsets = np.arange(lengths.max())
    return starts[:, None] + np.minimum(offsets, lengths[:, None] - 1), offsets < lengths[:, None]


def prefix_mask(is_prefix: np.ndarray, queries: int, like: Tensor) -> Tensor:
    """0 where a continuation's query sees a key, -inf elsewhere: all its prefix, then its own tokens up to itself."""
    rows = len(is_prefix)
    own = np.tri(queries, dtype=bool)
    seen = np.concatenate(
        (
            np.broadcast_to(is_prefix[:, None], (rows, queries, is_prefix.shape[1])),
            np.broadcast_to(own, (rows, *own.shape)),
        ),
        axis=2,
    )
    mask = torch.zeros(rows, 1, *seen.shape[1:], dtype=like.dtype)
    return mask.masked_fill_(torch.from_numpy(~seen).unsqueeze(1), float("-inf")).to(like.device)


def partition(queries: np.ndarray, prefix_keys: np.ndarray) -> list[np.ndarray]:
    """Indices of sequences in groups such that all pairs of query and key, padding included, and calls cost least.

    Sequences are ordered by length, longest first; the best cuts of that order follow from those of its beginnings.
    """
    order = np.argsort(-(queries + prefix_keys), kind="stable")
    count = len(order)
    best, cut = np.zeros(count + 1), np.zeros(count + 1, int)
    longest_query, longest_prefix = np.zeros(count, int), np.zeros(count, int)  # of a group from here to `end`
    for end in range(1, count + 1):
        last = order[end - 1]
        np.maximum(longest_query[:end], queries[last], out=longest_query[:end])
        np.maximum(longest_prefix[:end], prefix_keys[last], out=longest_prefix[:end])
        pairs = longest_query[:end] * (longest_query[:end] + longest_prefix[:end])
        costs = best[:end] + CALL_COST + np.arange(end, 0, -1) * pairs
        cut[end] = costs.argmin()
        best[end] = costs[cut[end]]
    groups, end = [], count
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]
