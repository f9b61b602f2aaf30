"""What is asked of an attention backend, and what a backend is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_llm.models.attention.segments import Segments


@dataclass(frozen=True)
class Request:
    """The facts for which a backend may have to refuse."""

    device: str
    window: int | None = None  # tokens a query sees, itself included; none: all
    softcap: float | None = None  # scores become softcap * tanh(score / softcap); none: as they are


class Backend(Protocol):
    def refuses(self, request: Request) -> str | None:
        """Why this backend cannot do what is asked; None: it can."""
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
