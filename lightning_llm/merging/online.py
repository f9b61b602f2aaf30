"""Online merging: each step of training is merged with what a reference has learnt (Lu et al. 2024, arXiv 2405.17931).

With a step d that an optimizer proposes and the reference's task vector tau = theta_r - theta_b (Eq. 2):
    theta <- theta + F(d) (+) F(tau)
Without rescaling, as the paper has it, the mean of a step is the reserve rate times that of the optimizer alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_llm.merging.task_vectors import seed_of


def ondare(
    delta: Tensor,
    tau: Tensor,
    *,
    alpha: float,
    reserve_rate: float,
    generator: torch.Generator,
    rescale: bool = False,
) -> Tensor:
    """(1 - alpha) F(delta) + alpha F(tau), F a random part of the entries, drawn for each (Eq. 3 and 4).

    Args:
        delta, tau: of one parameter, of the same shape and unit.
        alpha: weight of the reference, in [0, 1].
        reserve_rate: probability of an entry to be kept, in (0, 1].
        rescale: divide what is kept by the rate, which the paper found unstable (section 4.2).
    """
    kept = dropped(delta, reserve_rate, generator, rescale=rescale)
    return (1 - alpha) * kept + alpha * dropped(tau, reserve_rate, generator, rescale=rescale)


def onties(delta: Tensor, tau: Tensor, *, alpha: float, reserve_rate: float) -> Tensor:
    """(1 - alpha) F(delta) (+) alpha F(tau), F the largest entries, (+) by consensus of signs (Eq. 5 to 7).

    Args:
        delta, tau: of one parameter, of the same shape and unit.
        alpha: weight of the reference, in [0, 1].
        reserve_rate: share of the entries that is kept, in (0, 1].
    """
    return consensus((1 - alpha) * largest(delta, reserve_rate), alpha * largest(tau, reserve_rate))


def largest(vector: Tensor, rate: float) -> Tensor:
    """The largest entries by size, a share `rate` of them and at least one, else 0 (Eq. 6)."""
    if rate == 1 or not vector.numel():
        return vector
    sizes = vector.abs()
    count = max(math.ceil(rate * vector.numel()), 1)
    return torch.where(sizes >= sizes.flatten().topk(count, sorted=False).values.min(), vector, 0.0)


def consensus(a: Tensor, b: Tensor) -> Tensor:
    """Entry by entry: the sum where signs agree or one is 0, else the larger; 0 where they are opposite (Eq. 7)."""
    opposed = a.sign() * b.sign() < 0
    larger = torch.where(a.abs() > b.abs(), a, torch.where(b.abs() > a.abs(), b, 0.0))
    return torch.where(opposed, larger, a + b)


def dropped(vector: Tensor, rate: float, generator: torch.Generator, *, rescale: bool) -> Tensor:
    """Each entry with probability `rate`, else 0.

    Args:
        generator: on the vector's device.
        rescale: divide by the rate: the mean over the draws is then the vector.
    """
    if rate == 1:
        return vector
    mask = torch.empty_like(vector).bernoulli_(rate, generator=generator)
    return vector * mask.div_(rate) if rescale else vector * mask


def seeded(seed: int, *parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of the seed and of what they are for."""
    return torch.Generator(device).manual_seed(seed_of(seed, *parts))
