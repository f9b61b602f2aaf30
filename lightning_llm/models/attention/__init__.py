"""Causal attention within segments, a continuation also to its prefix: one function, several backends."""

from __future__ import annotations

from torch import Tensor

from lightning_llm.models.attention.request import Backend, Request
from lightning_llm.models.attention.sdpa import Sdpa
from lightning_llm.models.attention.segments import Segments
from lightning_llm.settings import UserError

__all__ = ["BACKENDS", "Request", "Segments", "attention", "choose_backend"]

BACKENDS: dict[str, Backend] = {"sdpa": Sdpa()}


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
        UserError: the backend is unknown or cannot do what is asked.
    """
    name = choose_backend(backend, Request(q.device.type, window, softcap))
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[name](q, k, v, segments, window=window, softcap=softcap, scale=factor)


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
