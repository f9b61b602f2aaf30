"""What a teacher says of the tokens that a stage consumes: read memory-mapped, found by a token's place in the store.

teacher.json                k and types
<source>/spans.npy          [units + 1, 2] int64: where each unit begins in tokens.bin and in these files; then the ends
<source>/teacher_ids.bin    [tokens, k] uint16 or int32: the likeliest ids in the place of each token
<source>/teacher_logps.bin  [tokens, k + 2] float16 or uint8: their log-probabilities, the label's where it is none of
                            them, and that of all others (losses/distillation.py)

Units are those of `data/packing.py:Feed`, in the order of the store. Where nothing is a target there are zeros. The
packing does not matter: the left context of a token is always the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lightning_llm.data.token_store import map_file
from lightning_llm.settings import UserError

IDS, LOG_P = "teacher_ids", "teacher_logps"  # names of files and of columns


class KeptColumn:
    """Rows of numbers of some tokens of a store; `column[begin:end]` takes places in the store's tokens.bin."""

    def __init__(self, values: np.ndarray, begins: np.ndarray, offsets: np.ndarray):
        """
        Args:
            values: [kept tokens, width].
            begins, offsets: [units + 1], where a unit begins in tokens.bin, ascending, and in `values`; last, the end.
        """
        self.values, self.begins, self.offsets = values, begins, offsets
        self.shape, self.dtype = values.shape, values.dtype

    def __getitem__(self, places: slice) -> np.ndarray:
        """Of tokens that lie in one unit.

        Raises:
            UserError: the teacher was not asked about them.
        """
        unit = int(self.begins[:-1].searchsorted(places.start, "right")) - 1
        first = int(self.offsets[unit]) + places.start - int(self.begins[unit])
        last = first + places.stop - places.start
        if unit < 0 or last > self.offsets[unit + 1]:
            what = f"says nothing of the tokens from {places.start} to {places.stop}"
            raise UserError("the teacher's artifact", what, "It is another stage's: make this one's again")
        return self.values[first:last]


@dataclass(frozen=True)
class TeacherFormat:
    """How many ids are kept of each token, and in which types."""

    k: int
    ids: str  # uint16 | int32
    log_p: str | None  # float16 | uint8; None: ids alone

    @classmethod
    def of(cls, k: int, log_p: str | None, vocabulary: int) -> TeacherFormat:
        """With ids as narrow as the vocabulary allows."""
        return cls(k, "uint16" if vocabulary <= 1 << 16 else "int32", log_p)

    @property
    def columns(self) -> dict[str, tuple[np.dtype, int]]:
        """Name -> type, and numbers of each token."""
        ids = {IDS: (np.dtype(self.ids), self.k)}
        return ids if self.log_p is None else {**ids, LOG_P: (np.dtype(self.log_p), self.k + 2)}

    @property
    def bytes_per_token(self) -> int:
        """On disk."""
        return sum(dtype.itemsize * width for dtype, width in self.columns.values())

    def write(self, artifact: Path) -> None:
        """Say it in teacher.json."""
        (artifact / "teacher.json").write_text(json.dumps(asdict(self)) + "\n", "utf-8")

    @classmethod
    def read(cls, artifact: Path) -> TeacherFormat:
        """What `write` has said.

        Raises:
            UserError: nothing was.
        """
        path = Path(artifact) / "teacher.json"
        if not path.is_file():
            raise UserError(str(artifact), "holds nothing of a teacher", "Make its node again")
        return cls(**json.loads(path.read_text("utf-8")))

    def open(self, folder: Path) -> dict[str, KeptColumn]:
        """The columns of a source, memory-mapped, by name.

        Raises:
            UserError: a file is missing or was cut.
        """
        spans = np.load(folder / "spans.npy")
        found = {}
        for name, (dtype, width) in self.columns.items():
            path = folder / f"{name}.bin"
            tokens = int(spans[-1, 1])
            if not path.is_file() or path.stat().st_size != tokens * width * dtype.itemsize:
                raise UserError(
                    str(path), f"does not hold {width} numbers for each of {tokens} tokens", "Make it again"
                )
            found[name] = KeptColumn(map_file(path, dtype).reshape(tokens, width), *spans.T)
        return found
