"""What `prepare` says about the rows of its sources: what was kept, and by name what was skipped or is too long.

prepare.json has the counts. The rows themselves stand in files beside it, one a line, written as they are met, so that
any number of them costs no memory: `skipped.jsonl` (source, where: file and line, what: the reason) and `long.jsonl`
(source, where, tokens: the context that the row needs). Where there is no such row there is no such file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lightning_llm.settings import UserError

SKIPPED, LONG = "skipped.jsonl", "long.jsonl"


class RowLists:
    """The two files of an artifact; use it in a `with`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, TextIO] = {}

    def append(self, name: str, **facts: str | int) -> None:
        """Name a row in a file, which begins with its first row."""
        if name not in self._files:
            # half a character, as in a field's name, is written as JSON's own escape of it
            self._files[name] = (self.folder / name).open("w", encoding="utf-8", errors="backslashreplace")
        self._files[name].write(json.dumps(facts, ensure_ascii=False) + "\n")

    def __enter__(self) -> RowLists:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


@dataclass
class SourceReport:
    """What is known of a source's rows."""

    name: str
    lists: RowLists
    fingerprint: str
    commit: str | None = None  # of a data set on the hub, as it was when it was read
    form: str = ""
    layouts: dict[str, int] = field(default_factory=dict)  # how the rows were kept -> rows
    skipped: int = 0  # malformed rows
    first_skipped: str | None = None  # where and what
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)  # context -> rows that are longer than it
    splits: dict[str, dict[str, int]] = field(default_factory=dict)  # rows, tokens, targets

    def skip(self, error: UserError) -> None:
        """Count and list a malformed row."""
        self.skipped += 1
        self.first_skipped = self.first_skipped or f"{error.where} {error.what}"
        self.lists.append(SKIPPED, source=self.name, where=error.where, what=error.what)

    def count_long(self, length: int, where: str, contexts: list[int], on_long: str) -> None:
        """Count a row that needs a context of `length` under each context that is shorter, and list it."""
        shorter = [context for context in contexts if length > context]
        for context in shorter:
            long = self.dropped.setdefault(str(context), {"rows": 0, "on_long": on_long, "first": where})
            long["rows"] += 1
        if shorter:
            self.lists.append(LONG, source=self.name, where=where, tokens=length)

    def facts(self) -> dict[str, Any]:
        """What prepare.json says about the source."""
        counted = {"skipped": self.skipped, "dropped": self.dropped}
        if self.skipped:
            counted |= {"first_skipped": self.first_skipped, "skipped_rows": SKIPPED}
        if self.dropped:
            counted |= {"dropped_rows": LONG}
        read = {"fingerprint": self.fingerprint, "form": self.form, "layouts": self.layouts, "commit": self.commit}
        return {**read, **counted, "splits": self.splits}
