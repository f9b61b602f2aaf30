"""The backend `varlen`: torch's own variable-length kernel (its copy of flash attention 2); NVIDIA GPUs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_llm.models.attention.ranges import ranges_of, refuses_flash_kernels, window_size
from lightning_llm.models.attention.request import Request
from lightning_llm.models.attention.segments import Segments


class Varlen:
    """Takes the batch as it lies; only the keys of a prefix with several continuations are gathered."""

    def refuses(self, request: Request) -> str | None:
        """Why torch's varlen kernel cannot do what is asked; None: it can."""
        if request.softcap is not None:
            return "has no soft-capping"
        reason = refuses_flash_kernels(request.device, request.dtype, request.head_size, request.capability)
        if reason is None and not torch.backends.cuda.is_flash_attention_available():
            return "needs a torch that is built with flash attention"
        return reason

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
        varlen_attn, says_grouped = load_kernel()
        ranges = segments.derive(("ranges", q.device), lambda: ranges_of(segments, q.device))
        output = varlen_attn(
            q,
            ranges.gather(k),
            ranges.gather(v),
            ranges.cu_seqlens_q,
            ranges.cu_seqlens_k,
            ranges.max_seqlen_q,
            ranges.max_seqlen_k,
            scale=scale,
            window_size=window_size(window),
            **({"enable_gqa": q.shape[1] != k.shape[1]} if says_grouped else {}),
        )
        assert isinstance(output, Tensor)  # a tuple only where auxiliary outputs are asked for
        return output


@cache
def load_kernel() -> tuple[Callable[..., Any], bool]:
    """varlen_attn, and whether it wants to be told of grouped heads: torch 2.11's groups them without a word."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters
