"""Tokenised rows on disk, memory-mapped: flat tokens, offsets, and which tokens are targets.

tokens.bin     ids of all segments one after the other, uint16, or uint32 for more than 65,536 entries
offsets.npy    [segments + 1] int64; a row is 1 segment, 3 for a pair (prompt, chosen, rejected), or 4 for a ranking,
               whose last, the edited response, may be empty
targets.bin    [tokens] bool, whether a token is to be learnt; absent where all are
counts.npy     [rows] int64, targets of each row when it stands alone and uncut
judged.bin     [rows, 13] int8, of a ranking: strength (0: unknown), then grades of its responses (-1)
rows.jsonl     what judges need of a row beside its tokens; only for pairs, rankings, questions and prompts
store.json     form, counts, dtype
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_llm.data.config import GRADED
from lightning_llm.settings import UserError

SEGMENTS = {"text": 1, "conversations": 1, "pairs": 3, "rankings": 4, "questions": 1, "prompts": 1}  # of a row
RANKED = ("chosen", "rejected", "edited")  # a ranking's responses, in the order of its segments
JUDGED = 1 + len(RANKED) * len(GRADED)  # numbers that judged.bin has of a row


class StoredRow(NamedTuple):
    """A row's segments, and for each which tokens are to be learnt (None: all)."""

    segments: list[np.ndarray]
    masks: list[np.ndarray | None]


class TokenStore:
    """Rows of one form. `open` one to read, `TokenStoreWriter` writes one."""

    def __init__(self, directory: Path, facts: dict[str, Any]):
        self.directory = directory
        self.form: str = facts["form"]
        self.rows: int = facts["rows"]
        self.tokens: int = facts["tokens"]
        self.targets: int = facts["targets"]
        self.segments_per_row = SEGMENTS[self.form]
        self.ids = map_file(directory / "tokens.bin", np.dtype(facts["dtype"]))
        self.offsets = np.load(directory / "offsets.npy", mmap_mode="r").view(np.ndarray)
        self.target_counts = np.load(directory / "counts.npy", mmap_mode="r").view(np.ndarray)  # [rows]
        judged = directory / "judged.bin"
        self.judged = map_file(judged, np.dtype(np.int8)).reshape(self.rows, JUDGED) if judged.is_file() else None
        masked = directory / "targets.bin"
        self.is_target = map_file(masked, np.dtype(np.bool_)) if masked.is_file() else None

    @classmethod
    def open(cls, directory: Path | str) -> TokenStore:
        """
        Raises:
            UserError: there is no store.
        """
        directory = Path(directory)
        facts = directory / "store.json"
        if not facts.is_file():
            raise UserError(str(directory), "holds no token store", "Prepare the data again")
        return cls(directory, json.loads(facts.read_text("utf-8")))

    def token_slice(self, row: int) -> slice:
        """Where the row's tokens lie in tokens.bin, and so in any file that holds one number per token."""
        k = self.segments_per_row
        return slice(int(self.offsets[row * k]), int(self.offsets[(row + 1) * k]))

    def segment_offsets(self, row: int) -> list[int]:
        """Begin of each of the row's segments in tokens.bin, and the end of the last."""
        k = self.segments_per_row
        return self.offsets[row * k : (row + 1) * k + 1].tolist()

    def row(self, row: int) -> StoredRow:
        """A row's segments as they lie in the files, memory-mapped and not copied.

        Returns:
            ids of each segment, and which of them are targets (None: all).
        """
        offsets = self.segment_offsets(row)
        spans = list(itertools.pairwise(offsets))
        masks: list[np.ndarray | None] = [None if self.is_target is None else self.is_target[a:b] for a, b in spans]
        return StoredRow([self.ids[a:b] for a, b in spans], masks)

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, all its segments together."""
        return np.diff(self.offsets[:: self.segments_per_row])

    @cached_property
    def row_contexts(self) -> np.ndarray:
        """The context that each row needs to stand uncut: of a pair, prompt and longer response."""
        lengths = np.diff(self.offsets).reshape(self.rows, self.segments_per_row)
        return lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0)

    def metadata(self) -> list[dict[str, Any]]:
        """For each row of pairs or questions: prompt messages, answer, task, responses."""
        path = self.directory / "rows.jsonl"
        if not path.is_file():
            return [{} for _ in range(self.rows)]
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


class TokenStoreWriter:
    """Appends rows to a new store; the store is there when it has been closed."""

    def __init__(self, directory: Path, form: str, vocab_size: int):
        self.directory, self.form = directory, form
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.tokens = self.targets = 0
        self.rows = 0
        directory.mkdir(parents=True, exist_ok=True)
        self._offsets, self._counts = (_GrowingArray(directory / f"{name}.npy") for name in ("offsets", "counts"))
        self._offsets.append(0)
        self._ids = (directory / "tokens.bin").open("wb")
        self._mask = (directory / "targets.bin").open("wb") if form != "text" else None
        self._judged = (directory / "judged.bin").open("wb") if form == "rankings" else None
        has_metadata = form in ("pairs", "rankings", "questions", "prompts")
        self._rows = (directory / "rows.jsonl").open("w", encoding="utf-8") if has_metadata else None

    def append(
        self,
        segments: Sequence[Sequence[int]],
        masks: Sequence[Sequence[bool]] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Add a row. Where it has no masks, all of its tokens are targets."""
        count = 0
        for i, ids in enumerate(segments):
            mask = np.ones(len(ids), bool) if masks is None else np.asarray(masks[i], bool)
            self._ids.write(np.asarray(ids, self.dtype).tobytes())
            if self._mask:
                self._mask.write(mask.tobytes())
            self.tokens += len(ids)
            self._offsets.append(self.tokens)
            count += int(mask.sum()) - int(i == 0 and mask[0])  # nothing predicts a row's first token
        if self._judged:
            self._judged.write(judgements(metadata or {}).tobytes())
        self._counts.append(count)
        self.targets += count
        self.rows += 1
        if self._rows:
            self._rows.write(json.dumps(metadata or {}, ensure_ascii=False) + "\n")

    def facts(self) -> dict[str, int]:
        """What is written so far: rows, tokens, and targets among them."""
        return {"rows": self.rows, "tokens": self.tokens, "targets": self.targets}

    def close(self) -> None:
        """Complete the store."""
        self._offsets.complete()
        self._counts.complete()
        self.abandon()
        facts = {**self.facts(), "dtype": self.dtype.name, "form": self.form}
        (self.directory / "store.json").write_text(json.dumps(facts, indent=2), "utf-8")

    def abandon(self) -> None:
        """Close the files and leave no store."""
        for file in (self._ids, self._mask, self._rows, self._judged, self._offsets.file, self._counts.file):
            if file:
                file.close()


def judgements(content: dict[str, Any]) -> np.ndarray:
    """A row of judged.bin: strength (0: unknown), then each response's grades, ordered as `RANKED` and `GRADED`."""
    grades = content.get("grades", {})
    flat = [grades.get(response, {}).get(name, -1) for response in RANKED for name in GRADED]
    return np.asarray([content.get("strength", 0), *flat], np.int8)


class _GrowingArray:
    """A .npy file of int64 that is written number by number: a store of any size costs no memory.

    numpy leaves room in the header for the length to grow, so that it can be said at the end.
    """

    def __init__(self, path: Path):
        self.file = path.open("wb")
        self.length = 0
        self._write_header()

    def append(self, number: int) -> None:
        """Write one more number, of 64 bits."""
        self.file.write(number.to_bytes(8, "little", signed=True))
        self.length += 1

    def complete(self) -> None:
        """Say in the header how many there are."""
        end = self.file.tell()
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() + 8 * self.length == end
        self.file.seek(end)

    def _write_header(self) -> None:
        header = {"descr": "<i8", "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)


def link_store(source: Path, target: Path) -> None:
    """A store that is there once more, without copying it where the file system can: nobody changes a finished store.

    Args:
        target: a folder that is not there yet.
    """
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        try:
            os.link(file.resolve(), target / file.name)
        except OSError:  # on another disk, or a file system without links
            shutil.copyfile(file, target / file.name)


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as an array that is read where it is touched. np.memmap's own indexing is ten times slower."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.frombuffer(memoryview(np.memmap(path, np.uint8, "r")), dtype)  # pyright: ignore[reportArgumentType]
