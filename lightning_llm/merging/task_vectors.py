"""Sums of what models have learnt, theta_m - init: plain, without conflicts of sign (TIES), of a random part (DARE)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from lightning_llm.merging.averaging import share, weighted_sum
from lightning_llm.merging.largest import largest_from, runs
from lightning_llm.merging.states import LazyState, Merge, Rule, State, blocks, differences, refuse_unlike


@Merge
def task_arithmetic(init: State, states: Sequence[State], scale: float = 1.0) -> LazyState:
    """init + scale * sum_m (theta_m - init) (Ilharco et al. 2022, arXiv 2212.04089).

    Args:
        scale: 1 / M makes it the mean; a negative one takes away what a model has learnt.

    Raises:
        ValueError: the states are of different models.
    """
    refuse_unlike([init, *states])
    shares = [scale] * len(states)

    def rule(entries: Sequence[Tensor]) -> Tensor:
        return weighted_sum([entries[0], *differences(*entries)], [1.0, *shares])

    return LazyState(states[0], [init, *states], lambda name: rule)


@Merge
def ties(init: State, states: Sequence[State], density: float = 0.2, scale: float = 1.0) -> LazyState:
    """Trim, elect signs, merge (TIES, Yadav et al. 2023, arXiv 2306.01708, algorithm 1).

    Of each task vector, over all parameters together, the largest `density` is kept. The sign of an entry is that of
    the sum; theta = init + scale * the mean of those that have it.

    Args:
        density: share of a task vector's entries that is kept, in (0, 1]; the paper's k is 20 %.
        scale: the paper's lambda, about 1.

    Raises:
        ValueError: the states are of different models, or density is out of range.
    """
    refuse_unlike([init, *states])
    positive_share(density, "density")
    everyone = [init, *states]

    def vectors() -> Iterator[list[Tensor]]:
        return (differences(*entries) for name in init for entries in blocks(everyone, name))

    sampled = zip(*(differences(*entries) for entries in runs(everyone)), strict=True)
    thresholds = largest_from(vectors, [torch.cat(parts) for parts in sampled], density)

    def rule(entries: Sequence[Tensor]) -> Tensor:
        kept = [trimmed(vector, least) for vector, least in zip(differences(*entries), thresholds, strict=True)]
        return added(entries[0], agreed_mean(kept), scale)

    return LazyState(states[0], everyone, lambda name: rule)


@Merge
def dare(init: State, states: Sequence[State], density: float = 0.1, scale: float = 1.0, seed: int = 0) -> LazyState:
    """Drop and rescale (DARE, Yu et al. 2023, arXiv 2311.03099), then task arithmetic.

    Of each task vector every entry stays with probability `density`, divided by it, so that the mean is what it was:
    theta = init + scale * sum_m (mask_m / density) (theta_m - init).

    Args:
        density: in (0, 1]; one minus the paper's drop rate, which goes up to 0.9 and beyond.
        scale: as in `task_arithmetic`.
        seed: what is dropped is a function of it, of the parameter's name and of the model's place in the list.

    Raises:
        ValueError: the states are of different models, or density is out of range.
    """
    refuse_unlike([init, *states])
    positive_share(density, "density")

    def rule_of(name: str) -> Rule:
        draws = [np.random.SFC64(seed_of(seed, name, place)) for place in range(len(states))]

        def rule(entries: Sequence[Tensor]) -> Tensor:
            merged = entries[0].clone()
            for vector, draw in zip(differences(*entries), draws, strict=True):
                random_part(vector, density, scale / density, draw, onto=merged)
            return merged

        return rule

    return LazyState(states[0], [init, *states], rule_of)


# ---- of one tensor ----


def added(start: Tensor, vector: Tensor, scale: float) -> Tensor:
    """start + scale * vector."""
    return start.add(vector, alpha=scale)


def trimmed(vector: Tensor, least: float) -> Tensor:
    """0 in the place of entries that are smaller than `least`, a number of fp32, by size."""
    below = torch.tensor(least).nextafter(torch.tensor(0.0)).item()
    return hardshrink(vector, below)  # which keeps what is larger, in one pass


def agreed_mean(vectors: Sequence[Tensor]) -> Tensor:
    """TIES' election: of M vectors of one shape the mean of those entries whose sign is that of their sum; 0 where none
    is.

    What is 0 has been trimmed and does not count.
    """
    elected = weighted_sum(vectors, [1.0] * len(vectors)).sign_()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector in vectors:
        agreeing = (vector * elected).clamp_(min=0)  # its size where it has that sign, else 0
        total += agreeing
        count += agreeing.sign_()
    return total.div_(count.clamp_(min=1)).mul_(elected)


def random_part(vector: Tensor, density: float, scale: float, draw: np.random.SFC64, onto: Tensor) -> Tensor:
    """onto + scale * mask * vector in the place of `onto`, each entry's mask 1 with probability `density`, else 0.

    Args:
        draw: gives 32 bits to each entry.
    """
    bits = draw.random_raw((len(vector) + 1) // 2).view(np.uint32)[: len(vector)]
    mask = torch.from_numpy((bits < round(density * 2**32)).view(np.uint8))
    return onto.addcmul_(vector, mask.to(vector), value=scale)  # torch's product with another type is slower


def seed_of(seed: int, *parts: object) -> int:
    """A number of 63 bits that is a function of the seed and of what it is for."""
    digest = hashlib.blake2b(" ".join(map(str, (seed, *parts))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def positive_share(value: float, name: str) -> float:
    """`value`, if it lies in (0, 1].

    Raises:
        ValueError: it does not; names it.
    """
    if value == 0:
        raise ValueError(f"{name} must be above 0")
    return share(value, name)
