"""How far a stage that scores has come: what an interrupted run has left, so that the next one goes on there.

Batches follow one another in an order that is always the same, so a count of them is a place. It is written down once
what they have given is on disk; what a killed process has written beyond it is written again, to the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

FILE = "scored.json"  # there while the artifact is made
EVERY = 1.0  # seconds between two records


@dataclass
class Scored:
    """Sums over the batches of all parts, in order; the place is the next batch of a part."""

    micro_batch_tokens: int  # decides what a batch is
    part: int = 0
    batches: int = 0  # of the part
    place: int = 0  # tokens of the part
    tokens: int = 0
    targets: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, micro_batch_tokens: int) -> Scored:
        """Where the last record in a folder says that scoring was; the beginning without one, and with one of batches
        of another size."""
        path = folder / FILE
        if path.is_file():
            left = cls(**json.loads(path.read_text("utf-8")))
            if left.micro_batch_tokens == micro_batch_tokens:
                return left
        return cls(micro_batch_tokens)

    def __post_init__(self):
        self._since = self._recorded = time.perf_counter()

    def add(self, tokens: int, targets: int, flops: float, sums: Mapping[str, float]) -> None:
        """One more batch of the part."""
        self.batches += 1
        self.place += tokens
        self.tokens += tokens
        self.targets += targets
        self.flops += flops
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def end_part(self) -> None:
        """Go on with the first batch of the next part."""
        self.part, self.batches, self.place = self.part + 1, 0, 0

    def record(self, folder: Path, files: Iterable[np.ndarray], *, at_once: bool = False) -> None:
        """Write it down, if that is due, once what has been written into memory-mapped files is on disk."""
        if not at_once and time.perf_counter() - self._recorded < EVERY:
            return
        for file in files:
            if isinstance(file, np.memmap):
                file.flush()
        temporary = folder / f".{FILE}"
        temporary.write_text(json.dumps(asdict(self)), "utf-8")
        temporary.replace(folder / FILE)
        self._recorded = time.perf_counter()

    @staticmethod
    def forget(folder: Path) -> None:
        """All is scored: nobody will go on."""
        (folder / FILE).unlink(missing_ok=True)
