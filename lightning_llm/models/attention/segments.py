"""Where a batch's segments lie in its run of tokens, and what backends derive from that once per batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

Derived = TypeVar("Derived")


class Segments:
    """S segments one after the other in a run of T tokens; some continue an earlier one, their prefix.

    A token sees its segment's tokens up to itself and all of its segment's prefix; with a window only the last of them.
    """

    def __init__(self, lengths: list[int], prefixes: list[int]):
        self.lengths = np.array(lengths)
        self.prefixes = np.array(prefixes)  # the segment that this one continues, -1: none
        self.starts = self.lengths.cumsum() - self.lengths
        self.prefix_lengths = np.where(self.prefixes >= 0, self.lengths[self.prefixes], 0)
        self._derived: dict[Hashable, Any] = {}

    def derive(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """What `make` gives for this batch, made once: all layers of a kind ask for the same."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]
