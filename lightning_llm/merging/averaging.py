"""Averages of models: of several at once, of one as it goes on, and the way back towards where they began."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_llm.merging.states import LazyState, Merge, State, refuse_unlike


@Merge
def linear(states: Sequence[State], weights: Sequence[float] | None = None) -> LazyState:
    """theta = sum_m w_m theta_m. Uniform weights are a model soup (Wortsman et al. 2022, arXiv 2203.05482).

    Llama 3 averages models of different data and settings after each step of post-training (section 4.1.5); of reward
    models with a common beginning it is WARM (Ramé et al. 2024, arXiv 2401.12187).

    Args:
        states: of one architecture, with the same names.
        weights: of each state; none: 1 / M. They add up to 1: others would scale the model.

    Raises:
        ValueError: the states are of different models, or the weights are not theirs.
    """
    refuse_unlike(states)
    shares = [1 / len(states)] * len(states) if weights is None else list(weights)
    refuse_weights(shares, len(states))
    return LazyState(states[0], states, lambda name: lambda entries: weighted_sum(entries, shares))


@Merge
def ema(state: State, anchor: State, mu: float) -> LazyState:
    """Exponential moving average, one step: anchor + mu (state - anchor).

    Args:
        state: of the model now.
        anchor: the average so far.
        mu: how far it moves, in [0, 1]. WARP's anchor moves by 0.01 (arXiv 2406.16768, section 4).

    Raises:
        ValueError: the states are of different models, or mu is out of range.
    """
    return between(anchor, state, share(mu, "mu"), like=anchor)


@Merge
def liti(init: State, merged: State, eta: float) -> LazyState:
    """Linear interpolation towards the initialisation: (1 - eta) init + eta merged (WARP, arXiv 2406.16768, eq. LITI).

    Args:
        init: where training began.
        merged: where it has led.
        eta: how much of the way is kept, in [0, 1]; WARP takes 0.3 between its iterations.

    Raises:
        ValueError: the states are of different models, or eta is out of range.
    """
    return between(init, merged, share(eta, "eta"), like=merged)


def between(start: State, end: State, t: float, *, like: State) -> LazyState:
    """start + t (end - start); both ends come back as they are.

    Args:
        like: whose types the tensors have.
    """
    refuse_unlike([start, end])
    return LazyState(like, [start, end], lambda name: lambda ends: moved(ends[0], ends[1], t))


def follow(average: State, newest: State, share: float) -> None:
    """average + share (newest - average) in place, in the average's own types: the next step of an average of weights.

    Args:
        average: what it is so far; keep it in fp32.
        newest: at least these names.
        share: 1 - decay of an exponential average; 1 / n of the mean of n (Polyak & Juditsky 1992).
    """
    for name, tensor in average.items():
        moved(tensor, newest[name], share, out=tensor)


def moved(start: Tensor, end: Tensor, share: float, out: Tensor | None = None) -> Tensor:
    """start + share (end - start) in the type of the start; with a share of 0 or 1 exactly one of them."""
    return torch.lerp(start, end.to(start.dtype), share, out=out)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_m w_m x_m, one after the other into one new tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def refuse_weights(weights: Sequence[float], count: int) -> None:
    """Refuse weights that are not one for each of `count` states, or do not add up to 1.

    Raises:
        ValueError: says which.
    """
    if len(weights) != count:
        raise ValueError(f"weights must be one for each of {count} models, got {len(weights)}")
    if not abs(sum(weights) - 1) <= 1e-6:  # nor if one is no number
        raise ValueError(f"weights must add up to 1, got {sum(weights):g}")


def share(value: float, name: str) -> float:
    """`value`, if it lies in [0, 1].

    Raises:
        ValueError: it does not; names it.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value:g}")
    return value
