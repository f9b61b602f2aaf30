"""What a stage consumes when: shares of the sources over consumed tokens, and each source as an endless stream.

Both are closed forms. Nothing is drawn step by step, so any step can be asked for first, and no state is saved.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lightning_llm.schedules import Ramp, as_ramp, ramp_value
from lightning_llm.settings import UserError

BLOCK_UNITS = 4096  # units that are permuted at a time: an epoch of any length costs the memory of its blocks


class Mixture:
    """How many tokens each source should have given after any number of the stage's tokens.

    A source's share at a moment is its weight there over the sum of all; weights are ramps over the share of the stage
    that is done, [{at: share in [0, 1), value: weight}].
    """

    def __init__(self, weights: Mapping[str, Any], total_tokens: int):
        """
        Args:
            weights: of each source a number or a ramp.
            total_tokens: of the stage.

        Raises:
            UserError: a weight is negative or no ramp, or all are zero at some time.
        """
        self.total_tokens = total_tokens
        ramps: dict[str, Ramp] = {}
        for name, weight in weights.items():
            try:
                ramps[name] = as_ramp(weight)
            except ValueError as error:
                raise UserError(f"data.sources.{name}.weight", str(error), "Give a number or a ramp") from error
            if any(not entry["value"] >= 0 for entry in ramps[name]):
                raise UserError(f"data.sources.{name}.weight", "is negative", "Give 0 to leave the source out")
        changes = sorted({float(entry["at"]) for ramp in ramps.values() for entry in ramp if entry["at"] < 1})
        self._changes = [share * total_tokens for share in changes]  # tokens at which some weight changes
        self._rates: dict[str, list[float]] = {name: [] for name in ramps}  # share of the source in each piece
        for share in changes:
            now = {name: float(ramp_value(ramp, share)) for name, ramp in ramps.items()}
            if not sum(now.values()):
                raise UserError("data.sources", f"have no weight from {share:g} of the stage on", "Give one a weight")
            for name, weight in now.items():
                self._rates[name].append(weight / sum(now.values()))

    def target(self, source: str, tokens: int) -> int:
        """Tokens that the source should have given when the stage has consumed `tokens`: the integral of its share."""
        ends = [*self._changes[1:], math.inf]
        pieces = zip(self._changes, ends, self._rates[source], strict=True)
        return math.floor(sum(rate * (min(tokens, end) - begin) for begin, end, rate in pieces if tokens > begin))


class SourceStream:
    """The units of a source as an endless stream of tokens: epoch after epoch, each a new permutation of all units.

    The permutation has two levels, so that its cost does not grow with the source: blocks are permuted, and units
    within a block. A block holds every n-th unit (n prime), so it is a fair sample of a source that is sorted.
    """

    def __init__(self, name: str, lengths: np.ndarray, seed: int):
        """
        Args:
            name: with the seed it decides the order; another source changes nothing.
            lengths: tokens of each unit, [units], all positive.
        """
        self.lengths, self.units, self.tokens = lengths, len(lengths), int(lengths.sum())
        self._key = np.frombuffer(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest(), np.uint64)
        self._blocks = _next_prime(math.ceil(self.units / BLOCK_UNITS))
        self._block_tokens = np.array([lengths[b :: self._blocks].sum() for b in range(self._blocks)], np.int64)
        self._block_units = np.array([len(lengths[b :: self._blocks]) for b in range(self._blocks)], np.int64)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._orders: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def units_before(self, position: int) -> int:
        """How many units start before a position of the stream."""
        epoch, offset = divmod(position, self.tokens)
        _, token_begins, unit_begins = self._epoch(epoch)
        rank = int(np.searchsorted(token_begins, offset, "right")) - 1
        _, begins = self._block(epoch, rank)
        inside = int(np.searchsorted(begins, offset - token_begins[rank], "left"))
        return epoch * self.units + int(unit_begins[rank]) + inside

    def units_from(self, position: int) -> Iterator[tuple[int, int]]:
        """(unit, position of its first token) from the unit that covers a position on, without end."""
        epoch, offset = divmod(position, self.tokens)
        _, token_begins, _ = self._epoch(epoch)
        rank = int(np.searchsorted(token_begins, offset, "right")) - 1
        _, begins = self._block(epoch, rank)
        skip = int(np.searchsorted(begins, offset - token_begins[rank], "right")) - 1
        while True:
            base = epoch * self.tokens + int(self._epoch(epoch)[1][rank])
            units, begins = self._block(epoch, rank)
            while skip < len(units):  # a window rarely reads a block to its end
                upto = skip + 64
                for unit, begin in zip(units[skip:upto].tolist(), begins[skip:upto].tolist(), strict=True):
                    yield unit, base + begin
                skip = upto
            skip, rank = 0, rank + 1
            if rank == self._blocks:
                epoch, rank = epoch + 1, 0

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of the blocks, and tokens and units before each: [blocks] each."""
        if epoch not in self._epochs:
            if len(self._epochs) == 4:
                self._epochs.clear()
            order = self._random(epoch, 0).permutation(self._blocks)
            tokens, units = self._block_tokens[order], self._block_units[order]
            self._epochs[epoch] = order, tokens.cumsum() - tokens, units.cumsum() - units
        return self._epochs[epoch]

    def _block(self, epoch: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Units of the epoch's `rank`-th block in their order, and tokens of the block before each."""
        if (epoch, rank) not in self._orders:
            if len(self._orders) == 4:
                self._orders.clear()
            block = int(self._epoch(epoch)[0][rank])
            units = self._random(epoch, block + 1).permutation(int(self._block_units[block])) * self._blocks + block
            lengths = self.lengths[units]
            self._orders[epoch, rank] = units, lengths.cumsum() - lengths
        return self._orders[epoch, rank]

    def _random(self, epoch: int, block: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, epoch, block]))


def _next_prime(n: int) -> int:
    """The smallest prime >= n, and 1 for 1."""
    while any(n % divisor == 0 for divisor in range(2, math.isqrt(n) + 1)):
        n += 1
    return n
