"""A batch's segments as the ranges of queries and keys that variable-length kernels take, and their window.

One range holds a segment's queries and, as its keys, its prefix's tokens and then its own. The kernels align the last
query with the last key (bottom right), so causal attention over such a range is what a continuation wants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_llm.models.attention.segments import Segments


@dataclass(frozen=True)
class Ranges:
    """N ranges of queries, one after the other over all T tokens, and as many of keys."""

    cu_seqlens_q: Tensor  # [N + 1] int32
    cu_seqlens_k: Tensor  # [N + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: Tensor | None  # token that each key is; None: the keys are the tokens as they lie

    def gather(self, x: Tensor) -> Tensor:
        """Keys or values [T, K, D] in the order of the ranges."""
        return x if self.key_index is None else x.index_select(0, self.key_index)


def ranges_of(segments: Segments, device: torch.device) -> Ranges:
    """The ranges of a batch. A prefix and the continuation right behind it are one range."""
    is_joined = (segments.prefixes >= 0) & (segments.prefixes == np.arange(len(segments.prefixes)) - 1)
    first = np.flatnonzero(~is_joined)
    lengths = np.add.reduceat(segments.lengths, first)
    prefix_lengths, prefixes = segments.prefix_lengths[first], segments.prefixes[first]
    key_lengths = prefix_lengths + lengths
    key_index = None
    if prefix_lengths.any():
        key_index = np.concatenate([
            np.r_[segments.starts[prefix] : segments.starts[prefix] + before, start : start + length]
            for prefix, before, start, length in zip(
                prefixes, prefix_lengths, segments.starts[first], lengths, strict=True
            )
        ])  # fmt: skip
    return Ranges(
        cumulated(lengths, device),
        cumulated(key_lengths, device),
        int(lengths.max()),
        int(key_lengths.max()),
        None if key_index is None else torch.from_numpy(key_index).to(device),
    )


def cumulated(lengths: np.ndarray, device: torch.device) -> Tensor:
    """[N + 1] int32, from 0 to the sum."""
    return torch.from_numpy(np.concatenate(([0], lengths.cumsum())).astype(np.int32)).to(device)


def window_size(window: int | None) -> tuple[int, int]:
    """Keys to the left of a query's own, and to its right, that the kernels let it see; -1 is all of them."""
    return (-1 if window is None else window - 1, 0)


def refuses_flash_kernels(
    device: str, dtype: torch.dtype, head_size: int, capability: tuple[int, int] | None
) -> str | None:
    """What flash attention 2, in the package and in torch, asks of its inputs: csrc/flash_attn/flash_api.cpp."""
    if device != "cuda" or capability is None:
        return "needs an NVIDIA GPU"
    if capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more (Ampere), this one has {'.'.join(map(str, capability))}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes in fp16 and bf16, not in {str(dtype).removeprefix('torch.')}"
    if head_size > 256 or head_size % 8:
        return f"takes head sizes up to 256 that are multiples of 8, not {head_size}"
    return None
