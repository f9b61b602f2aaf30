"""Soft-capping: numbers that stay between two bounds, smoothly."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_capped(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap), which lies between -cap and cap and is x near 0 (Gemma 2, arXiv 2408.00118, section 2).

    Args:
        x: scores or logits, any shape.
        cap: > 0, in the unit of x; None: x as it is.

    Returns:
        In the shape and type of x.
    """
    return x if cap is None else cap * torch.tanh(x / cap)
