"""How large an entry must be to be among the largest of vectors that do not fit in memory: exactly, mostly in one pass.

Numbers that are not negative are in the order of their bits, and a pass tells 2**19 neighbours in that order apart.
Which neighbours is guessed from a sample; where the guess was wrong, the passes that follow need none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from lightning_llm.merging.states import State, shape_of, widened

BINS = 2**19  # around a guess they are all numbers within 3 % of it
TOP = 2**31  # above the bits of every fp32 number that is not negative
RUN, RUNS = 1024, 2048  # of a sample: entries in a row, and how many rows, of which each parameter has one at least


def largest_from(
    vectors: Callable[[], Iterable[Sequence[Tensor]]], samples: Sequence[Tensor], density: float
) -> list[float]:
    """For each of some vectors, how large its entries must be to be among its largest `density`.

    Args:
        vectors: gives the vectors anew, block by block: the same flat part of all of them, of which sizes rounded to
            fp32 are compared.
        samples: some entries of each vector; without any, all numbers are as likely.
    """
    thresholds = [_Threshold(density, sample) for sample in samples]
    while still_open := [each for each in thresholds if each.is_open]:
        for parts in vectors():
            for each, part in zip(thresholds, parts, strict=True):
                if each.is_open:
                    each.count(part)
        for each in still_open:
            each.narrow()
    return [each.value for each in thresholds]


def runs(states: Sequence[State]) -> Iterator[list[Tensor]]:
    """As `states.blocks`, but of all parameters, and with gaps: a sample of any model is soon read."""
    first = states[0]
    total = sum(math.prod(shape_of(first, name)) for name in first)
    step = RUN * max(total // (RUN * RUNS), 1)
    for name in first:
        flat = [state[name].flatten() for state in states]
        whole = len(flat[0]) - len(flat[0]) % step
        yield widened([entries[:whole].view(-1, step)[:, :RUN].flatten() for entries in flat])
        yield widened([entries[whole : whole + RUN] for entries in flat])


class _Threshold:
    """One vector's: the numbers from `low` to below `high`, by their bits, have it among them once all are counted."""

    def __init__(self, density: float, sample: Tensor):
        self.density = density
        self.low, self.high = 0, TOP
        if len(sample):
            sizes = _bits(sample)
            place = len(sizes) - max(math.ceil(density * len(sizes)), 1)
            guess = int(np.partition(sizes, place)[place])
            self.low = min(max(guess - BINS // 2, 0), TOP - BINS)
            self.high = self.low + BINS
        self.is_open = True
        self._begin()

    def _begin(self) -> None:
        self.shift = max((self.high - self.low - 1).bit_length() - (BINS - 1).bit_length(), 0)
        self.total = self.above = 0  # entries, and those from `high` on
        self.counts = np.zeros(BINS, np.int64)  # of those between, by their bits above the last `shift`
        self.waiting: list[np.ndarray] = []  # for as many that counting them is worth going through all bins
        self.waits = 0  # how many that are

    @property
    def value(self) -> float:
        """The threshold, once it is known."""
        return np.uint32(self.low).view(np.float32).item()

    def count(self, vector: Tensor) -> None:
        """Count the entries of a part."""
        bits = _bits(vector)
        np.subtract(bits, np.uint32(self.low), out=bits)  # those below `low` are from TOP on now
        inside = bits[bits < self.high - self.low]
        self.total += len(bits)
        self.above += int(np.count_nonzero(bits < TOP)) - len(inside)
        self.waiting.append(inside >> self.shift)
        self.waits += len(inside)
        if self.waits > BINS:
            self._add_up()

    def _add_up(self) -> None:
        if self.waiting:
            self.counts += np.bincount(np.concatenate(self.waiting), minlength=BINS)
        self.waiting, self.waits = [], 0

    def narrow(self) -> None:
        """After a pass: the range in which the threshold lies, and whether that is one number."""
        self._add_up()  # what was waiting
        wanted = max(math.ceil(self.density * self.total), 1) - self.above  # from above, within the range
        from_above = self.counts[::-1].cumsum()
        if not self.total:
            self.is_open = False
        elif wanted <= 0:
            self.low, self.high = self.high, TOP
        elif wanted > from_above[-1]:
            self.low, self.high = 0, self.low
        else:
            self.low += (BINS - 1 - int(from_above.searchsorted(wanted))) << self.shift
            self.high = self.low + (1 << self.shift)
            self.is_open = self.shift > 0
        self._begin()


def _bits(vector: Tensor) -> np.ndarray:
    """Of the sizes in fp32, in memory of its own."""
    return vector.abs().float().cpu().numpy().view(np.uint32)
