"""The verb prepare: a tokenizer trained on the recipe's text, or rows of every source as tokens on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lightning_llm.data.sources import Row, Source, open_source
from lightning_llm.data.token_store import TokenStore, TokenStoreWriter
from lightning_llm.data.tokenizer import Tokenizer, train_tokenizer
from lightning_llm.settings import UserError
from lightning_llm.stages.config import PrepareSettings, TokenizerSettings
from lightning_llm.stages.context import StageContext, StageResult

TOGETHER = 512  # rows tokenised at a time: all cores are busy, and little waits in memory
LISTED = 1000  # skipped or dropped rows named in prepare.json; all are counted
ACCEPTED = {  # the form that a stage asks for -> forms of the rows that it can learn from
    "text": {"text"},
    "conversations": {"conversations", "text"},
    "pairs": {"pairs"},
    "questions": {"questions"},
}
# The held-out data of an evaluation names its forms in front of its sources.
FORM_OF_PREFIX = {"text": "text", "tasks": "questions", "pairs": "pairs"}


def run(context: StageContext) -> StageResult:
    """Make a tokenizer (`tokenizer/`) or token stores (`sources/<name>/<split>/`, `prepare.json`).

    Raises:
        UserError: a source or a row is not what it should be; the message names file and line.
    """
    if isinstance(context.settings, TokenizerSettings):
        return _make_tokenizer(context, context.settings)
    return _prepare_sources(context, context.settings)


# ---- tokenizer ----


def _make_tokenizer(context: StageContext, settings: TokenizerSettings) -> StageResult:
    if settings.source == "train":
        tokenizer = _train(context, settings)
    elif Path(settings.source).expanduser().is_dir():
        tokenizer = Tokenizer.load(Path(settings.source).expanduser())
    else:
        tokenizer = Tokenizer.load(_download(settings.source))
    tokenizer.save(context.output / "tokenizer")
    (context.output / "tokenizer_fingerprint").write_text(tokenizer.fingerprint, "utf-8")
    return StageResult({"vocab_size": tokenizer.vocab_size})


def _train(context: StageContext, settings: TokenizerSettings) -> Tokenizer:
    config = settings.tokenizer
    if not config.sources:
        raise UserError("tokenizer.sources", "names no text", "Give it a source, as {code: {path: embedded:code}}")
    texts: list[str] = []
    for done, (name, source_config) in enumerate(config.sources.items()):
        context.console.update(done, len(config.sources), "sources")
        source = open_source(source_config, f"tokenizer.sources.{name}")
        size = 0
        malformed: UserError | None = None  # they are counted where they are prepared
        for row in source.rows(["train"]):
            if isinstance(row, UserError):
                malformed = malformed or row
            elif not row.is_held_out(settings.validation):
                text = _plain_text(row)
                texts.append(text)
                size += len(text.encode("utf-8"))
                if size >= config.sample_bytes:
                    break
        if malformed and not size:  # not one row can be read: its columns are named wrongly, say
            raise malformed
    try:
        return train_tokenizer(texts, config.vocab_size)
    except ValueError as error:
        raise UserError("tokenizer.vocab_size", str(error), "Raise it") from error


def _plain_text(row: Row) -> str:
    """What the merges are learnt from: the words of a row in any form."""
    content = row.content
    if "text" in content:
        return content["text"]
    messages = content.get("messages") or content["prompt"]
    turns = [line for message in messages for line in (message["role"], message["content"])]
    return "\n".join([*turns, *(content[name] for name in ("chosen", "rejected") if name in content)])


def _download(name: str) -> Path:
    """The tokenizer files of a model on the Hugging Face hub."""
    from huggingface_hub import snapshot_download

    wanted = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            "model.tokenizer",
            f"{name} is no directory here, and cannot be had from the hub ({reason})",
            "Check the name and the connection, or give a directory with tokenizer.json",
        ) from error


# ---- sources ----


@dataclass
class _Report:
    """What prepare.json says about a source."""

    fingerprint: str
    form: str = ""
    skipped: int = 0  # malformed rows
    skipped_rows: list[dict[str, str]] = field(default_factory=list)
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)  # context -> rows that are longer than it
    splits: dict[str, dict[str, int]] = field(default_factory=dict)  # rows, tokens, targets


def _prepare_sources(context: StageContext, settings: PrepareSettings) -> StageResult:
    tokenizer = Tokenizer.load(context.inputs["tokenizer"] / "tokenizer")
    data = settings.data
    opened: dict[str, Source] = {}
    for name, config in data.sources.items():  # all are found before the first is read
        where = f"data.sources.{name}"
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name:
            raise UserError(where, "cannot be a folder's name", "Use letters, digits, dot, dash and underscore")
        opened[name] = open_source(config, where)
    if not opened:
        raise UserError("data.sources", "is empty", "Name a source")
    reports: dict[str, _Report] = {}
    for done, (name, source) in enumerate(opened.items()):
        reports[name] = _prepare_source(context, settings, name, source, tokenizer, (done, len(opened)))
    content = {
        "tokenizer": tokenizer.fingerprint,
        "validation": data.validation,
        "sources": {name: vars(report) for name, report in reports.items()},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (context.output / "prepare.json").write_text(text, "utf-8")
    (context.output / "tokenizer_fingerprint").write_text(tokenizer.fingerprint, "utf-8")
    tokens = {name: sum(split["tokens"] for split in report.splits.values()) for name, report in reports.items()}
    rows = sum(split["rows"] for report in reports.values() for split in report.splits.values())
    skipped = sum(report.skipped for report in reports.values())
    return StageResult({"rows": rows, "tokens": sum(tokens.values()), "skipped": skipped}, tokens)


def _prepare_source(
    context: StageContext,
    settings: PrepareSettings,
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    place: tuple[int, int],  # index of the source, number of sources
) -> _Report:
    """Read a source once, and write the rows of each split that is wanted."""
    data, report = settings.data, _Report(source.fingerprint)
    writers: dict[str, TokenStoreWriter] = {}
    origins: dict[str, list[str]] = {split: [] for split in settings.splits}  # where each row came from
    folder = context.output / "sources" / name
    count = 0
    rows = _wanted_rows(source, name, settings, report)
    try:
        while batch := list(islice(rows, TOGETHER)):
            for split in settings.splits:
                chosen = [row for row in batch if row.is_held_out(data.validation) == (split == "validation")]
                if split not in writers:
                    writers[split] = TokenStoreWriter(folder / split, report.form, tokenizer.vocab_size)
                appended = _append(writers[split], chosen, tokenizer, settings.data.on_error, report)
                origins[split] += [row.where for row in appended]
            count += len(batch)
            done = sum(writer.tokens for writer in writers.values())
            context.console.update(count, source.config.max_rows, "rows", source=place[0] + 1, tokens=done)
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    if not writers:
        raise UserError(source.where, f"{source.config.path} has no rows", "Give it rows, or leave the source out")
    for split, writer in writers.items():
        writer.close()
        report.splits[split] = writer.facts()
    if report.skipped:
        first = f"{report.skipped_rows[0]['where']} {report.skipped_rows[0]['what']}"
        context.console.note(
            f"{report.skipped} malformed rows of {name} skipped, all in prepare.json; the first: {first}"
        )
    total = sum(split["rows"] for split in report.splits.values())
    empty = [split for split, facts in report.splits.items() if not facts["rows"]]
    if "train" in empty and total:
        raise UserError(
            f"data.sources.{name}",
            f"{'its one row is' if total == 1 else f'all its {total} rows are'} held out by hash",
            "Split it into more rows, or set data.validation=0",
        )
    if "validation" in empty and data.validation:
        context.console.note(f"{name} has no held-out row among {total}: no validation loss of it")
    if report.form != "text":
        _count_long(report, folder, origins, settings)
    return report


def _wanted_rows(source: Source, name: str, settings: PrepareSettings, report: _Report) -> Iterator[Row]:
    """Rows of the form that is asked for; malformed ones stop the stage or are counted and listed."""
    data = settings.data
    prefix, slash, _ = name.partition("/")
    asked = FORM_OF_PREFIX.get(prefix, data.form) if slash else data.form
    if asked not in ACCEPTED:
        raise UserError("data.form", f"is {asked!r}", f"Choose one of {', '.join(ACCEPTED)}")
    for row in source.rows(settings.splits):
        if isinstance(row, Row) and row.form not in ACCEPTED[asked]:
            row = UserError(row.where, f"is of form {row.form}, {asked} is asked for", "Set data.form, or mend the row")
        if isinstance(row, Row) and report.form and row.form != report.form:
            what = f"is of form {row.form}, the rows before it are of form {report.form}"
            row = UserError(row.where, what, "Make two sources of them, or leave it out with data.on_error=skip")
        if isinstance(row, Row):
            report.form = row.form
            yield row
        else:
            _stop_or_skip(row, data.on_error, report)


def _stop_or_skip(row: UserError, on_error: str, report: _Report) -> None:
    if on_error not in ("stop", "skip"):
        raise UserError("data.on_error", f"is {on_error!r}", "Choose stop or skip")
    if on_error == "stop":
        raise row
    report.skipped += 1
    if len(report.skipped_rows) < LISTED:
        report.skipped_rows.append({"where": row.where, "what": row.what})


def _append(
    writer: TokenStoreWriter, rows: list[Row], tokenizer: Tokenizer, on_error: str, report: _Report
) -> list[Row]:
    """Tokenise rows of one form; those that a chat template refuses are malformed. Returns the others."""
    try:
        _append_all(writer, rows, tokenizer)
        return rows
    except UserError:  # of which row is not said: one by one, nothing has been written yet
        appended = []
        for row in rows:
            try:
                _append_all(writer, [row], tokenizer)
                appended.append(row)
            except UserError as error:
                _stop_or_skip(UserError(row.where, f"{error.where} {error.what}", error.remedy), on_error, report)
        return appended


def _append_all(writer: TokenStoreWriter, rows: list[Row], tokenizer: Tokenizer) -> None:
    contents = [row.content for row in rows]
    if writer.form == "text":
        for ids in tokenizer.encode_documents([content["text"] for content in contents]):
            writer.append([ids])
    elif writer.form == "conversations":
        for rendered in tokenizer.render_many([content["messages"] for content in contents]):
            writer.append([rendered.ids], [rendered.mask])
    elif writer.form == "questions":
        prompts = tokenizer.render_many([content["prompt"] for content in contents], add_generation_prompt=True)
        for content, prompt in zip(contents, prompts, strict=True):
            writer.append([prompt.ids], [[False] * len(prompt.ids)], content)
    else:
        pairs = tokenizer.render_pairs([(row["prompt"], [row["chosen"], row["rejected"]]) for row in contents])
        for content, (prompt, chosen, rejected) in zip(contents, pairs, strict=True):
            masks = [[False] * len(prompt), [True] * len(chosen), [True] * len(rejected)]
            writer.append([prompt, chosen, rejected], masks, content)


def _count_long(report: _Report, folder: Path, origins: dict[str, list[str]], settings: PrepareSettings) -> None:
    """List the conversations and pairs that are longer than a context; `on_long` says what becomes of them."""
    for length in sorted(set(settings.contexts)):
        long: list[str] = []
        for split, where in origins.items():
            rows = np.flatnonzero(TokenStore.open(folder / split).row_contexts > length)
            long += [where[row] for row in rows.tolist()]
        if long and settings.data.on_long == "stop":
            raise UserError(
                long[0],
                f"is longer than the context of {length} ({len(long)} such rows)",
                "Raise the context, or set data.on_long to drop or truncate_left",
            )
        if long:
            report.dropped[str(length)] = {"rows": len(long), "on_long": settings.data.on_long, "where": long[:LISTED]}
