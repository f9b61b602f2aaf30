"""The backend `flash`: the flash-attn package's variable-length kernel; NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lightning_llm.models.attention.ranges import ranges_of, refuses_flash_kernels, window_size
from lightning_llm.models.attention.request import Request
from lightning_llm.models.attention.segments import Segments
from lightning_llm.settings import UserError


class Flash:
    """Flash attention 2 (Dao 2023, arXiv 2307.08691): with window and soft-cap, keys gathered as for `varlen`."""

    def refuses(self, request: Request) -> str | None:
        """Why flash-attn cannot do what is asked; None: it can.

        Raises:
            UserError: it is installed and broken.
        """
        reason = refuses_flash_kernels(request.device, request.dtype, request.head_size, request.capability)
        if reason is None and importlib.util.find_spec("flash_attn") is None:
            return "is not installed: pip install 'lightning-llm[flash]'"
        if reason is None:
            load_kernel()  # what is installed must work, or it is an error: no other kernel takes its place
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
        ranges = segments.derive(("ranges", q.device), lambda: ranges_of(segments, q.device))
        return load_kernel()(
            q,
            ranges.gather(k),
            ranges.gather(v),
            ranges.cu_seqlens_q,
            ranges.cu_seqlens_k,
            ranges.max_seqlen_q,
            ranges.max_seqlen_k,
            softmax_scale=scale,
            causal=True,
            window_size=window_size(window),
            softcap=softcap or 0.0,  # its word for none
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


@cache
def load_kernel() -> Callable[..., Tensor]:
    """flash_attn_varlen_func.

    Raises:
        UserError: the package is there but its kernel cannot be loaded, as when it was built for another torch.
    """
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    except Exception as error:  # a missing symbol, a missing library, a half-installed package: all mean broken
        raise UserError(
            "compute.attention",
            f"flash-attn is installed but broken ({type(error).__name__}: {error})",
            f"Build it again for torch {torch.__version__}, or uninstall it",
        ) from error
