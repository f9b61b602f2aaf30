"""Causal attention within segments, a continuation also to its prefix: one function, several backends."""

from __future__ import annotations

from torch import Tensor

from lightning_llm.models.attention.choice import BACKENDS, choose_backend, explain
from lightning_llm.models.attention.request import Request, capability
from lightning_llm.models.attention.segments import Segments

__all__ = ["BACKENDS", "Request", "Segments", "attention", "capability", "choose_backend", "explain"]


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
        window: tokens a query sees, itself included, the last ones of prefix and segment together; None: all.
        softcap: scores become softcap * tanh(score / softcap); None: as they are.
        scale: factor of the scores, before soft-capping; None: 1 / sqrt(D).
        backend: a name in BACKENDS, or "auto".

    Returns:
        [T, H, D].

    Raises:
        UserError: the backend is unknown, cannot do what is asked, or is installed and broken.
    """
    name = choose_backend(backend, Request.of(q, k, v, window, softcap))
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[name](q, k, v, segments, window=window, softcap=softcap, scale=factor)
