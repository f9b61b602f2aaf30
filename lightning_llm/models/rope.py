"""Rotary position embeddings: the angles of a batch once, then one rotation of queries and keys per layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_llm.settings import UserError


def inverse_frequencies(rope_parameters: dict[str, Any], head_size: int, device: torch.device | None = None) -> Tensor:
    """theta^(-2i/D) for i = 0 .. D/2-1 (Su et al. 2021, arXiv 2104.09864), float32 [D/2], radians per token."""
    rope_type = rope_parameters.get("rope_type", "default")
    if rope_type != "default":
        raise UserError("model.rope_parameters.rope_type", f"{rope_type!r} is not built yet", "Use default")
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    return 1.0 / rope_parameters["rope_theta"] ** exponents


def rotation(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every token's angles, float32 [T, 1, D] each; the same for all layers and heads."""
    angles = positions[:, None, None] * inverse_frequencies  # [T, 1, D/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of [T, heads, D] by the token's angles, in float32; type of x kept."""
    exact = x.float()
    other_half = exact.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(other_half * sin, exact, cos).to(x.dtype)
