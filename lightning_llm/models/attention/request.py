"""What is asked of an attention backend, and what a backend is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_llm.models.attention.segments import Segments


@dataclass(frozen=True)
class Request:
    """The facts for which a backend may have to refuse."""

    device: str
    dtype: torch.dtype
    head_size: int
    window: int | None = None  # tokens a query sees, itself included; none: all
    softcap: float | None = None  # scores become softcap * tanh(score / softcap); none: as they are
    needs_gradient: bool = True
    capability: tuple[int, int] | None = None  # of the GPU; none: there is none

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None) -> Request:
        """What a call with these tensors asks."""
        needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return cls(q.device.type, q.dtype, q.shape[-1], window, softcap, needs_gradient, capability(q.device))


def capability(device: torch.device) -> tuple[int, int] | None:
    """(8, 0) for Ampere, (9, 0) for Hopper, ...; None for what is no NVIDIA GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


class Backend(Protocol):
    """A way to compute attention over segments, chosen by what it refuses."""

    def refuses(self, request: Request) -> str | None:
        """Why this backend cannot do what is asked; None: it can.

        Raises:
            UserError: what it needs is installed and broken.
        """
        ...

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
        """[T, H, D] of queries [T, H, D] and of keys and values [T, K, D]."""
        ...
