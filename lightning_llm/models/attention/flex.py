"""The backend `flex`: torch's FlexAttention, compiled for a GPU; on a CPU for evaluation only, and slow there.

The batch is one sequence for it; a table of tiles says which 128 queries meet which 128 keys at all, a function of two
tokens which of those see one another. Lengths, window and soft-cap are tensors to both: a Python number would be
compiled in, or become a symbol that the compiler cannot lower.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_llm.models.attention.request import Request
from lightning_llm.models.attention.segments import Segments

TILE = 128  # queries and keys; FlexAttention's default
SMALLEST_HEAD = 16  # of its GPU kernel
# By itself it takes its kernel for decoding where queries are few, and has none for four heads to one of 32.
KERNEL = {"BACKEND": "TRITON"}


class Flex:
    """Window and prefix are the mask's, soft-capping is a function of the score."""

    def refuses(self, request: Request) -> str | None:
        """Why FlexAttention cannot do what is asked; None: it can."""
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
        """[T, H, D] of q [T, H, D], k and v [T, K, D]; see `attention`."""
        mask = segments.derive(("tiles", window, q.device), lambda: block_mask(segments, window, q.device))
        if q.is_cpu:  # it asks for the flag also where no gradient is recorded
            q, k, v = q.detach(), k.detach(), v.detach()
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, T, D]
        heads = q.shape[1], k.shape[1]
        attend = uncompiled if q.is_cpu else kernel(window, softcap, scale, heads, q.dtype)
        output = attend(
            q,
            k,
            v,
            score_mod=None if softcap is None else soft_capping(softcap, q.device),
            block_mask=mask,
            scale=scale,
            enable_gqa=heads[0] != heads[1],
            kernel_options=None if q.is_cpu else KERNEL,
        )
        return output[0].transpose(0, 1)


@cache
def kernel(
    window: int | None,
    softcap: float | None,
    scale: float,
    heads: tuple[int, int],
    dtype: torch.dtype,
    backend: str = "inductor",
) -> Callable[..., Tensor]:
    """FlexAttention for one kind of layer, compiled for all lengths. What cannot be compiled is an error.

    Each kind has a code object of its own, since torch keeps what it has compiled, and counts it against a limit (8),
    by code object. Lengths and gradients take up to six, so that models of other heads or types in one process, as a
    policy and what judges it, have kinds of their own. Past the limit it would go on uncompiled and say nothing:
    `fullgraph` makes that an error too.

    Args:
        heads: queries', keys'.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return flex_attention(q, k, v, **options)

    kind = f"attend_{window}_{softcap}_{scale}_{heads[0]}_{heads[1]}_{dtype}".replace(".", "_")
    attend.__code__ = attend.__code__.replace(co_name=kind)
    return torch.compile(attend, dynamic=True, fullgraph=True, backend=backend)


def uncompiled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """FlexAttention on a CPU, without its warning that it is not compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")
        return flex_attention(q, k, v, **options)


@cache
def has_triton() -> bool:
    """Whether torch finds the compiler that its kernel needs."""
    from torch.utils._triton import has_triton

    return has_triton()


@cache
def soft_capping(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    """Soft-capping of a score, as the function that FlexAttention wants."""
    cap = torch.tensor(softcap, device=device)

    def score_mod(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def block_mask(segments: Segments, window: int | None, device: torch.device):
    """FlexAttention's mask of a batch: the table of tiles, and which pairs of tokens count inside them."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens = int(segments.lengths.sum())
    segment = np.repeat(np.arange(len(segments.lengths)), segments.lengths)
    positions = np.arange(tokens) + (segments.prefix_lengths - segments.starts)[segment]
    of_token = [torch.from_numpy(x).to(device) for x in (segment, segments.prefixes[segment], positions)]
    own, prefix, position = of_token
    oldest = position - ((window or 0) - 1)  # that a window shows

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        related = (own[key] == own[query]) | (own[key] == prefix[query])
        return related & (position[key] <= position[query])

    def windowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return causal(row, head, query, key) & (position[key] >= oldest[query])

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
