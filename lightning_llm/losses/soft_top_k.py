"""Soft top-k: scores to masks in [0, 1] that add up to k, exactly, with exact gradients."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

HALVINGS = 200  # of the bracket, at most: float64 has no number between its ends long before


class SoftTopK(torch.autograd.Function):
    """`soft_top_k` with the gradient of what it solves for, not of how it is solved."""

    @staticmethod
    def forward(ctx, scores: Tensor, k: float, temperature: float) -> Tensor:
        """[.., n] of scores [.., n]."""
        exact = scores.double()
        masks = torch.exp((exact + budget_shift(exact, k, temperature)) / temperature).clamp(max=1.0)
        ctx.save_for_backward(masks)
        ctx.temperature = temperature
        return masks.to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """ds of a gradient g [.., n], by the implicit function; what is at 1 stays there.

        On F = {m < 1}: dm_i / ds_j = m_i / eps (delta_ij - m_j / sum_F m), so ds = m / eps (g - <g>), <g> the mean of g
        over F weighted by m.
        """
        [masks] = ctx.saved_tensors
        free = masks.where(masks < 1, 0)
        exact = gradient.double()
        mean = (free * exact).sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp(min=torch.finfo(free.dtype).tiny)
        return (free * (exact - mean) / ctx.temperature).to(gradient.dtype), None, None


def soft_top_k(scores: Float[Tensor, "*rows n"], k: int | float, temperature: int | float) -> Float[Tensor, "*rows n"]:
    """The masks of a budget with the most score and entropy (Lei et al. 2023, CoDA, arXiv 2304.04947, section 3.2).

        max over 0 <= m <= 1, sum m = k  of  <s, m> + eps H(m),  H(m) = -sum m log m
        =>  m_i = min(1, exp((s_i + a) / eps)),  a such that sum m = k

    With eps -> 0 it is 1 for the k largest scores and 0 for the others, with eps -> infinity k / n for all. The paper
    finds it by coordinate descent, which overshoots the budget where eps is small; bisection finds a to the last bit.

    Args:
        scores: of each row; all rows have the same budget.
        k: budget, in (0, n]; need not be whole.
        temperature: eps > 0, in the scores' unit.

    Raises:
        ValueError: a budget or a temperature that is none.
    """
    if not 0 < k <= scores.shape[-1]:
        raise ValueError(f"k lies in (0, {scores.shape[-1]}], the number of scores, is {k:g}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, is {temperature:g}")
    return SoftTopK.apply(scores, float(k), float(temperature))


def annealed_budget(progress: float, units: int, target: int, ramp: float) -> float:
    """The budget after a share `progress` of a stage: from all units linearly to `target` at `ramp`, then constant.

    So masks begin as ones, and the model as it was.
    """
    done = 1.0 if progress >= ramp else progress / ramp
    return units - (units - target) * done


def annealed_temperature(progress: float, first: float, final: float) -> float:
    """The temperature after a share `progress` of a stage: geometric, `first` at 0 and `final` at 1."""
    return first * (final / first) ** progress


def budget_shift(scores: Float[Tensor, "*rows n"], k: float, temperature: float) -> Float[Tensor, "*rows 1"]:
    """a of `soft_top_k`, by bisection between a shift that makes no mask larger than k / n and one that makes all 1."""
    count = scores.shape[-1]
    low = temperature * math.log(k / count) - scores.amax(-1, keepdim=True)
    high = -scores.amin(-1, keepdim=True)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if ((middle <= low) | (middle >= high)).all():
            break
        below = torch.exp((scores + middle) / temperature).clamp(max=1.0).sum(-1, keepdim=True) < k
        low, high = middle.where(below, low), high.where(below, middle)
    return high
