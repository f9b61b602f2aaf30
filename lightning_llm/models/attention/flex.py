"""The backend `flex`: torch's FlexAttention, compiled for a GPU; on a CPU for evaluation only, and slow there.

The batch is one sequence for it; a table of tiles says which 128 queries meet which 128 keys at all, a function of two
tokens which of those see one another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lightning_llm.models.attention.request import Request
from lightning_llm.models.attention.segments import Segments

TILE = 128  # queries and keys; FlexAttention's default
SMALLEST_HEAD = 16  # of its GPU kernel


class Flex:
    """Window and prefix are the mask's, soft-capping is a function of the score."""

    def refuses(self, request: Request) -> str | None:
        if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"computes in fp32, fp16 and bf16, not in {str(request.dtype).removeprefix('torch.')}"
        if request.device == "cpu":
            return "has no gradients on a CPU" if request.needs_gradient else None
        if request.device != "cuda":
            return "needs an NVIDIA GPU or, without gradients, a CPU"
        if request.head_size < SMALLEST_HEAD:
            return f"takes head sizes from {SMALLEST_HEAD}, not {request.head_size}"
        return None if has_triton() else "needs Triton to compile its kernel"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        *,
        window: int | None,
        softcap: float | None,
        scale: float,
    ) -> Tensor:
        mask = segments.derive(("tiles", window, q.device), lambda: block_mask(segments, window, q.device))
        if q.is_cpu:  # it asks for the flag also where no gradient is recorded
            q, k, v = q.detach(), k.detach(), v.detach()
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, T, D]
        with warnings.catch_warnings():  # on a CPU it warns that it is not compiled
            warnings.filterwarnings("ignore", message="flex_attention called without")
            output = kernel(compiled=q.is_cuda)(
                q,
                k,
                v,
                score_mod=None if softcap is None else soft_capping(softcap),
                block_mask=mask,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return output[0].transpose(0, 1)


@cache
def kernel(compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention; compiled once for all lengths."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


@cache
def has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


@cache
def soft_capping(softcap: float) -> Callable[..., Tensor]:
    """softcap * tanh(score / softcap), the same function object for the same number: it is compiled in."""

    def score_mod(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def block_mask(segments: Segments, window: int | None, device: torch.device):
    """FlexAttention's mask of a batch: the table of tiles, and which pairs of tokens count inside them."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens = int(segments.lengths.sum())
    segment = np.repeat(np.arange(len(segments.lengths)), segments.lengths)
    positions = np.arange(tokens) + (segments.prefix_lengths - segments.starts)[segment]
    of_token = [torch.from_numpy(x).to(device) for x in (segment, segments.prefixes[segment], positions)]
    own, prefix, position = of_token

    nearest = window or 0  # a number, so that it is compiled in

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        related = (own[key] == own[query]) | (own[key] == prefix[query])
        return related & (position[key] <= position[query])

    def windowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return causal(row, head, query, key) & (position[query] - position[key] < nearest)

    meets = tiles(segments, window)
    # each row's tiles that count, first
    indices = torch.from_numpy(np.argsort(~meets, axis=1, kind="stable").astype(np.int32)).to(device)
    counts = torch.from_numpy(meets.sum(1).astype(np.int32)).to(device)
    return BlockMask.from_kv_blocks(
        counts[None, None],
        indices[None, None],
        BLOCK_SIZE=TILE,
        mask_mod=causal if window is None else windowed,
        seq_lengths=(tokens, tokens),
    )


def tiles(segments: Segments, window: int | None) -> np.ndarray:
    """[tiles, tiles] bool: whether any of 128 queries may see any of 128 keys; without looking at pairs of tokens."""
    count = -(-int(segments.lengths.sum()) // TILE)
    meets = np.zeros((count, count), bool)
    ends = segments.starts + segments.lengths
    for start, end, prefix, before in zip(
        segments.starts, ends, segments.prefixes, segments.prefix_lengths, strict=True
    ):
        for tile in range(start // TILE, (end - 1) // TILE + 1):
            first, last = max(start, tile * TILE), min(end, (tile + 1) * TILE) - 1  # queries
            reach = first - start + before if window is None else window - 1  # keys that `first` sees before itself
            meets[tile, max(start, first - reach) // TILE : last // TILE + 1] = True
            from_prefix = min(reach - (first - start), before)
            if from_prefix > 0:
                meets[tile, (ends[prefix] - from_prefix) // TILE : (ends[prefix] - 1) // TILE + 1] = True
    return meets
