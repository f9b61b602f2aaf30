"""Causal attention within segments, a continuation also to its prefix: one function, several backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from lightning_llm.settings import UserError


@dataclass(frozen=True)
class Segments:
    """Where a batch's segments lie in its run of T tokens."""

    lengths: list[int]
    prefixes: list[int]  # index of the segment that this one continues; -1: none


@dataclass(frozen=True)
class Request:
    """What is asked of a backend."""

    device: str
    window: int | None
    softcap: float | None


class Sdpa:
    """torch's scaled_dot_product_attention: runs everywhere."""

    def refuses(self, request: Request) -> str | None:
        """Why this backend cannot do what is asked; None: it can."""
        if request.window is not None:
            return "has no sliding window yet"
        if request.softcap is not None:
            return "has no soft-capping yet"
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, T, D]
        starts = [0]
        for length in segments.lengths:
            starts.append(starts[-1] + length)
        outputs = []
        for start, end, prefix in zip(starts, starts[1:], segments.prefixes, strict=False):
            keys, values = k[:, :, start:end], v[:, :, start:end]
            mask = None
            if prefix >= 0:
                shared = slice(starts[prefix], starts[prefix + 1])
                keys = torch.cat((k[:, :, shared], keys), dim=2)
                values = torch.cat((v[:, :, shared], values), dim=2)
                mask = causal_lower_right(end - start, keys.shape[2])
            outputs.append(
                scaled_dot_product_attention(
                    q[:, :, start:end], keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )
            )
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)  # [T, H, D]


BACKENDS = {"sdpa": Sdpa()}


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
        q: queries [T, H, D]; k, v: keys and values [T, K, D], H a multiple of K.
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
    names = list(BACKENDS) if backend == "auto" else [backend]
    reasons = []
    for name in names:
        if name not in BACKENDS:
            raise UserError("compute.attention", f"{name!r} is not a backend", f"Use auto or {', '.join(BACKENDS)}")
        reason = BACKENDS[name].refuses(request)
        if reason is None:
            return name
        reasons.append(f"{name} {reason}")
    raise UserError("compute.attention", "; ".join(reasons), "Choose a model without it")
