"""Rows out of every source: embedded, the user's files and folders, a hub. Errors stand in place of malformed rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_llm.data.config import SourceConfig
from lightning_llm.data.embedded import CONTENTS, tasks, text
from lightning_llm.data.embedded.options import check_embedded, refuse_columns
from lightning_llm.data.fingerprints import source_fingerprint
from lightning_llm.data.gauge import Gauge, Tell
from lightning_llm.data.json_rows import read_json
from lightning_llm.data.places import datasets_folder, file_kind, source_files, split_path
from lightning_llm.data.rows import Row, read_row
from lightning_llm.data.tables import commit_on_hub, read_datasets_folder, read_hub, read_parquet
from lightning_llm.data.text_files import DOCUMENTS, read_text
from lightning_llm.settings import UserError

Found = Iterator[tuple[str, Any]]  # (where, fields or the error that stands for them)


@dataclass(frozen=True)
class Source:
    """A source that has been found, and can be read as often as one likes."""

    config: SourceConfig
    where: str  # the setting that names it, for error messages
    fingerprint: str

    @property
    def kind(self) -> str:
        """embedded | hub | tokens | datasets | files"""
        return split_path(self.config.path, self.where)[0]

    @cached_property
    def commit(self) -> str | None:
        """What a hub's revision stands for, if the hub can be asked: all its rows are read from there."""
        kind, name = split_path(self.config.path, self.where)
        is_remote = kind == "hub" and not Path(name).is_dir()
        return commit_on_hub(name, self.config.options.get("revision")) if is_remote else None

    def rows(
        self,
        splits: Sequence[str] = ("train", "validation"),
        asked: str | None = None,
        gauge: Gauge | None = None,
    ) -> Iterator[Row | UserError]:
        """All rows, and errors in place of malformed ones; at most `max_rows` good ones.

        Args:
            splits: what will be used. A source that makes its rows then makes no others; files give all their rows.
            asked: the form that is wanted, of a row that can be read as several.
            gauge: shows at each row how much of the source has been read.

        Raises:
            UserError: what lies there is damaged, or holds no rows but tokens.
        """
        kind, name = split_path(self.config.path, self.where)
        gauge = gauge or Gauge()
        if kind == "embedded":
            rows = _embedded(name, self.config.options, splits, self.where, gauge.part(0, 1))
        else:
            rows = self._checked(self._found(kind, name, gauge), asked)
        limit = float("inf") if self.config.max_rows is None else self.config.max_rows
        count = 0
        for row in rows:
            if count >= limit:
                return
            count += isinstance(row, Row)
            yield row

    def _found(self, kind: str, name: str, gauge: Gauge) -> Found:
        options, whole = self.config.options, gauge.part(0, 1)
        if kind == "hub":
            return read_hub(name, options, self.commit, self.where, whole)
        if kind == "datasets":
            return read_datasets_folder(*datasets_folder(name, options.get("split"), self.where), whole)
        if kind == "tokens":
            raise UserError(self.where, f"{name} holds tokens and no text", "Give the rows that they were made of")
        files = source_files(name, self.where)
        ends = [0, *itertools.accumulate(file.stat().st_size for file in files)]  # bytes
        parts = (gauge.part(begin / (ends[-1] or 1), end / (ends[-1] or 1)) for begin, end in itertools.pairwise(ends))
        return itertools.chain.from_iterable(map(self._read_file, files, parts))

    def _read_file(self, path: Path, tell: Tell) -> Found:
        kind, _ = file_kind(path) or ("", "")
        if not path.stat().st_size:
            return iter([(str(path), UserError(str(path), "is empty", "Fill it, or take it away"))])
        if kind == "text":
            return read_text(path, self.config.options.get("documents", DOCUMENTS[0]), tell)
        return read_parquet(path, tell) if kind == "parquet" else read_json(path, tell)

    def _checked(self, found: Found, asked: str | None) -> Iterator[Row | UserError]:
        for where, fields in found:
            if isinstance(fields, UserError):
                yield fields
                continue
            try:
                yield read_row(fields, self.config.columns, where, asked)
            except UserError as error:
                yield error


def open_source(config: SourceConfig, where: str) -> Source:
    """Find a source. Nothing is read but what its fingerprint needs.

    Args:
        where: the setting that names the source, as `data.sources.mine`.

    Raises:
        UserError: it does not exist, or there is no reader for it.
    """
    refuse_columns(config.path or "", config.columns, where)
    documents = config.options.get("documents", DOCUMENTS[0])
    if documents not in DOCUMENTS:
        raise UserError(f"{where}.options.documents", f"is {documents!r}", f"Choose one of {', '.join(DOCUMENTS)}")
    kinds = (
        [file_kind(file) for file in source_files(config.path or "", where)] if "documents" in config.options else []
    )
    if kinds and all(kind is not None and kind[0] != "text" for kind in kinds):
        raise UserError(f"{where}.options.documents", f"{config.path} has no text files", "Leave it out")
    return Source(config, where, source_fingerprint(config, where))


def _embedded(name: str, options: dict[str, Any], splits: Sequence[str], where: str, tell: Tell) -> Iterator[Row]:
    """Rows that come with the installation; `tell` is told the share of them.

    Options: of text max_bytes; of instructions, preferences and comparisons rows, held_out (rows), seed; of comparisons
    graded (the truthfulness of each response: whether its answer is right); of tasks task (one of the four; none: all),
    questions (of each task), held_out (of each; none: as many), split (train or validation; none: what is asked for),
    seed.
    """
    form, _ = CONTENTS[name]
    check_embedded(name, options, where)
    if form == "text":
        total, rows = _documents(name, options)
    elif form == "questions":
        total, rows = _questions(name, options, splits)
    else:
        total, rows = _made(name, form, options, splits)
    for number, row in enumerate(rows, 1):
        tell(number / total)
        yield row


def _documents(name: str, options: dict[str, Any]) -> tuple[int, Iterator[Row]]:
    """How many documents a domain has, and the documents."""
    found = text.documents(name, **options)
    held_out = {True: "validation", False: "train"}
    rows = (
        Row(f"embedded:{name} {key}", "text", {"text": document}, held_out[text.is_held_out(name, key)])
        for key, document in found
    )
    return len(found), rows


def _questions(name: str, options: dict[str, Any], splits: Sequence[str]) -> tuple[int, Iterator[Row]]:
    """How many questions there are, and the questions: of each split each task's."""
    seed, asked = options.get("seed", 0), options.get("questions", 150)
    counts = {"train": asked, "validation": options.get("held_out", asked)}
    chosen = [options["task"]] if options.get("task") else list(tasks.TASKS)
    wanted = [split for split in splits if options.get("split", split) == split]

    def make() -> Iterator[Row]:
        for split, task in itertools.product(wanted, chosen):
            for question in tasks.questions(split, task, counts[split], seed):
                content = {key: question[key] for key in ("answer", "task")}
                content["prompt"] = [{"role": "user", "content": question["question"]}]
                yield Row(f"embedded:{name} {question['question']}", "questions", content, split)

    return sum(counts[split] for split in wanted) * len(chosen), make()


def _made(name: str, form: str, options: dict[str, Any], splits: Sequence[str]) -> tuple[int, Iterator[Row]]:
    """How many conversations or pairs are made for the splits, and they."""
    seed = options.get("seed", 0)
    most = {"train": options.get("rows", 20_000 if form == "conversations" else 4_000)}
    most["validation"] = options.get("held_out", 400)

    def contents(split: str) -> Iterator[dict[str, Any]]:
        if form == "conversations":
            for messages in tasks.instructions(split, most[split], seed, options.get("multi_turn", 0.15)):
                yield {"messages": messages}
            return
        pairs = (tasks.preferences if name == "preferences" else tasks.comparisons)(split, most[split], seed)
        for pair in map(tasks.with_grades, pairs) if options.get("graded") else pairs:
            content = {key: value for key, value in pair.items() if key not in ("question", "working")}
            yield content | {"prompt": [{"role": "user", "content": pair["question"]}]}

    rows = (
        Row(f"embedded:{name} {split} {number}", form, content, split)
        for split in splits
        for number, content in enumerate(contents(split))
    )
    return sum(most[split] for split in splits), rows
