"""Sums of what models have learnt, theta_m - init: plain, without conflicts of sign (TIES), of a random part (DARE)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from lightning_llm.merging.averaging import share, weighted_sum
from lightning_llm.merging.states import LazyState, Merge, Rule, State, blocks, differences, refuse_unlike

DIGITS = 2**16  # an fp32 number's bits are two digits of this base; as integers they are in the order of its size


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

    def sizes(state: State) -> Callable[[], Iterable[Tensor]]:
        return lambda: (differences(*each)[0].abs() for name in init for each in blocks([init, state], name))

    thresholds = [largest_from(sizes(state), density) for state in states]

    def rule(entries: Sequence[Tensor]) -> Tensor:
        kept = [trimmed(vector, least) for vector, least in zip(differences(*entries), thresholds, strict=True)]
        return added(entries[0], agreed_mean(kept), scale)

    return LazyState(states[0], [init, *states], lambda name: rule)


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
    shares = [scale] * len(states)

    def rule_of(name: str) -> Rule:
        draws = [seeded(seed, name, place) for place in range(len(states))]

        def rule(entries: Sequence[Tensor]) -> Tensor:
            moved = zip(differences(*entries), draws, strict=True)
            kept = [dropped(vector, density, draw, rescale=True) for vector, draw in moved]
            return weighted_sum([entries[0], *kept], [1.0, *shares])

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
    digest = hashlib.blake2b(" ".join(map(str, (seed, *parts))).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def largest_from(sizes: Callable[[], Iterable[Tensor]], density: float) -> float:
    """How large an entry must be to be among the largest `density`: exactly, in two passes of constant memory.

    Numbers that are not negative are in the order of their bits: the first pass counts by the upper 16 of them, the
    second by the lower 16 among those that have the upper ones of the answer.

    Args:
        sizes: gives all entries anew, in flat blocks, none negative; rounded to fp32 they are what is compared.
    """
    upper = counted(sizes(), lambda bits: bits >> 16, DIGITS)
    wanted = max(math.ceil(density * int(upper.sum())), 1)
    first, left = digit_of(upper, wanted)
    begin = first * DIGITS
    lower = counted(sizes(), lambda bits: (bits - begin).clamp_(-1, DIGITS) + 1, DIGITS + 2)
    last, _ = digit_of(lower[1:-1], left)  # at the ends are all numbers that begin otherwise
    return torch.tensor(first * DIGITS + last, dtype=torch.int32).view(torch.float32).item()


def counted(sizes: Iterable[Tensor], digit: Callable[[Tensor], Tensor], digits: int) -> Tensor:
    """How often each of so many digits occurs among the entries' bits."""
    counts = torch.zeros(digits, dtype=torch.int64)
    for block in sizes:
        counts += torch.bincount(digit(block.float().view(torch.int32)), minlength=digits).cpu()
    return counts


def digit_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The digit of the entry that is number `wanted` from above, and which number it has among those of its digit."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, wanted))
    before = int(above[place - 1]) if place else 0
    return DIGITS - 1 - place, wanted - before


def positive_share(value: float, name: str) -> float:
    """`value`, if it lies in (0, 1].

    Raises:
        ValueError: it does not; names it.
    """
    if value == 0:
        raise ValueError(f"{name} must be above 0")
    return share(value, name)
