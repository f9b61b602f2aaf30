"""The verb prepare: a tokenizer trained on the recipe's text, or rows of every source as tokens on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from lightning_llm.data.gauge import Gauge, expected_rows
from lightning_llm.data.places import is_of_stage, prepared_facts, prepared_source
from lightning_llm.data.rows import Row
from lightning_llm.data.sources import Source, open_source
from lightning_llm.data.token_store import RANKED, TokenStore, TokenStoreWriter, link_store
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.settings import UserError
from lightning_llm.stages.config import PrepareSettings, TokenizerSettings
from lightning_llm.stages.context import StageContext, StageResult
from lightning_llm.stages.row_report import SKIPPED, RowLists, SourceReport
from lightning_llm.stages.samples import ROWS
from lightning_llm.stages.tokenizer import make_tokenizer

TOGETHER = 512  # rows tokenised at a time: all cores are busy, and little waits in memory
ACCEPTED = {  # the form that a stage asks for -> forms of the rows that it can learn from
    "text": {"text"},
    "conversations": {"conversations", "text"},
    "pairs": {"pairs"},
    "rankings": {"pairs"},
    "questions": {"questions"},
    "prompts": {"prompts", "questions"},
}
# The held-out data of an evaluation names its forms in front of its sources.
FORM_OF_PREFIX = {"text": "text", "tasks": "questions", "pairs": "pairs"}


def run(context: StageContext) -> StageResult:
    """Make a tokenizer (`tokenizer/`) or token stores (`sources/<name>/<split>/`, `prepare.json`, lists of rows).

    Raises:
        UserError: a source or a row is not what it should be; the message names file and line.
    """
    if isinstance(context.settings, TokenizerSettings):
        return make_tokenizer(context, context.settings)
    return _prepare_sources(context, context.settings)


def _prepare_sources(context: StageContext, settings: PrepareSettings) -> StageResult:
    tokenizer = Tokenizer.load(context.inputs["tokenizer"] / "tokenizer")
    data = settings.data
    opened: dict[str, Source] = {}
    for name, config in data.sources.items():  # all are found before the first is read
        where = f"data.sources.{name}"
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name:
            raise UserError(where, "cannot be a folder's name", "Use letters, digits, dot, dash and underscore")
        if is_of_stage(config.path):
            config = replace(config, path=str(context.inputs[f"source.{name}"] / ROWS))
        opened[name] = open_source(config, where)
    if not opened:
        raise UserError("data.sources", "is empty", "Name a source")
    reports: dict[str, SourceReport] = {}
    with RowLists(context.output) as lists:
        for place, (name, source) in enumerate(opened.items(), 1):
            report = reports[name] = SourceReport(name, lists, source.fingerprint, source.commit)
            if source.kind == "tokens":
                _take_tokens(context, settings, name, source, tokenizer, report)
            else:
                _prepare_source(context, settings, name, source, tokenizer, report, place)
            _check_report(context, settings, name, report)
    content = {
        "tokenizer": tokenizer.fingerprint,
        "validation": data.validation,
        "sources": {name: report.facts() for name, report in reports.items()},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # of half a character, which a malformed row's reason may quote, JSON's own escape
    (context.output / "prepare.json").write_text(text, "utf-8", errors="backslashreplace")
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
    report: SourceReport,
    place: int,  # of the source, from 1
) -> None:
    """Read a source once, and write the rows of each split that is wanted. Memory does not grow with the source."""
    data = settings.data
    writers: dict[str, TokenStoreWriter] = {}
    count = 0
    gauge = Gauge()
    rows = _wanted_rows(context, source, name, settings, report, gauge)
    try:
        while batch := list(islice(rows, TOGETHER)):
            for split in settings.splits:
                chosen = [row for row in batch if row.is_held_out(data.validation) == (split == "validation")]
                if split not in writers:
                    if report.form != "text":
                        tokenizer.check_template(_name_of(context.inputs["tokenizer"]))
                    folder = context.output / "sources" / name / split
                    writers[split] = TokenStoreWriter(folder, report.form, tokenizer.vocab_size)
                for row, length in _append(writers[split], chosen, tokenizer, data.on_error, report):
                    report.count_long(length, row.where, _contexts(settings, report), data.on_long)
            count += len(batch)
            done = sum(writer.tokens for writer in writers.values())
            total = expected_rows(count, gauge.share, source.config.max_rows)
            context.console.update(count, total, "rows", source=place, tokens=done)
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    if report.skipped and not any(writer.rows for writer in writers.values()):
        for writer in writers.values():
            writer.abandon()
        what = f"{source.config.path} has no row that can be used ({report.skipped} are malformed, the first: "
        raise UserError(source.where, f"{what}{report.first_skipped})", "Mend them, or name another source")
    if not writers:
        raise UserError(source.where, f"{source.config.path} has no rows", "Give it rows, or leave the source out")
    for split, writer in writers.items():
        writer.close()
        report.splits[split] = writer.facts()


def _check_report(context: StageContext, settings: PrepareSettings, name: str, report: SourceReport) -> None:
    """Tell what a source lacks, and refuse what cannot be trained on."""
    data = settings.data
    if report.skipped:
        skipped = f"{report.skipped:,} malformed rows of {name} skipped, all named in {SKIPPED}"
        context.console.note(f"{skipped}; the first: {report.first_skipped}")
    total = sum(split["rows"] for split in report.splits.values())
    empty = [split for split, facts in report.splits.items() if not facts["rows"]]
    if "train" in empty and total:
        raise UserError(
            f"data.sources.{name}",
            f"{'its one row is' if total == 1 else f'all its {total} rows are'} held out by hash",
            "Split it into more rows, or set data.validation=0",
        )
    longest = str(max(settings.contexts, default=0))
    long = report.dropped.get(longest, {"rows": 0})
    if "train" in settings.splits and data.on_long == "drop" and total and long["rows"] == total:
        raise UserError(
            f"data.sources.{name}",
            f"all its {total:,} rows are longer than the context of {longest}, the first: {long['first']}",
            "Raise the context, or set data.on_long=truncate_left",
        )
    if "validation" in empty and data.validation:
        context.console.note(f"{name} has no held-out row among {total}: no validation loss of it")
    shortest = min(report.dropped.items(), key=lambda entry: int(entry[0]), default=None)
    if shortest is not None and data.on_long == "stop":
        length, long = shortest
        raise UserError(
            long["first"],
            f"is longer than the context of {length} ({long['rows']} such rows)",
            "Raise the context, or set data.on_long to drop or truncate_left",
        )


def _contexts(settings: PrepareSettings, report: SourceReport) -> list[int]:
    """The contexts that a row has to fit: documents are cut, and fit any."""
    return [] if report.form == "text" else sorted(set(settings.contexts))


def _asked(settings: PrepareSettings, name: str) -> str:
    """The form that a source is asked for."""
    prefix, slash, _ = name.partition("/")
    asked = FORM_OF_PREFIX.get(prefix, settings.data.form) if slash else settings.data.form
    if asked not in ACCEPTED:
        raise UserError("data.form", f"is {asked!r}", f"Choose one of {', '.join(ACCEPTED)}")
    return asked


def _wanted_rows(
    context: StageContext, source: Source, name: str, settings: PrepareSettings, report: SourceReport, gauge: Gauge
) -> Iterator[Row]:
    """Rows of the form that is asked for; malformed ones stop the stage or are counted and listed."""
    data, asked = settings.data, _asked(settings, name)
    for row in source.rows(settings.splits, asked, gauge):
        if isinstance(row, Row) and row.form not in ACCEPTED[asked]:
            row = UserError(row.where, f"is of form {row.form}, {asked} is asked for", "Set data.form, or mend the row")
        if isinstance(row, Row) and asked == "rankings":  # a pair, with what else is known of it
            row = replace(row, form=asked)
        if isinstance(row, Row) and report.form and row.form != report.form:
            what = f"is of form {row.form}, the rows before it are of form {report.form}"
            row = UserError(row.where, what, "Make two sources of them, or leave it out with data.on_error=skip")
        if isinstance(row, UserError):
            _stop_or_skip(row, data.on_error, report)
            continue
        report.form = row.form
        if row.layout:
            if row.layout not in report.layouts:
                context.console.note(f"{name} is read as {row.form}: {row.layout}")
            report.layouts[row.layout] = report.layouts.get(row.layout, 0) + 1
        yield row


def _stop_or_skip(row: UserError, on_error: str, report: SourceReport) -> None:
    if on_error not in ("stop", "skip"):
        raise UserError("data.on_error", f"is {on_error!r}", "Choose stop or skip")
    if on_error == "stop":
        raise row
    report.skip(row)


def _append(
    writer: TokenStoreWriter, rows: list[Row], tokenizer: Tokenizer, on_error: str, report: SourceReport
) -> list[tuple[Row, int]]:
    """Tokenise rows of one form; those that a chat template refuses are malformed.

    Returns:
        The others, and the context that each of them needs.
    """
    try:
        return list(zip(rows, _append_all(writer, rows, tokenizer), strict=True))
    except UserError:  # of which row is not said: one by one, nothing has been written yet
        appended = []
        for row in rows:
            try:
                appended += zip([row], _append_all(writer, [row], tokenizer), strict=True)
            except UserError as error:
                _stop_or_skip(UserError(row.where, f"{error.where} {error.what}", error.remedy), on_error, report)
        return appended


def _append_all(writer: TokenStoreWriter, rows: list[Row], tokenizer: Tokenizer) -> list[int]:
    """Tokenise and write; returns the context that each row needs to stand uncut."""
    contents = [row.content for row in rows]
    if writer.form == "text":
        documents = tokenizer.encode_documents([content["text"] for content in contents])
        for ids in documents:
            writer.append([ids])
        return [len(ids) for ids in documents]
    if writer.form == "conversations":
        conversations = tokenizer.render_many([content["messages"] for content in contents])
        for rendered in conversations:
            writer.append([rendered.ids], [rendered.mask])
        return [len(rendered.ids) for rendered in conversations]
    if writer.form in ("questions", "prompts"):
        prompts = tokenizer.render_many([content["prompt"] for content in contents], add_generation_prompt=True)
        for content, prompt in zip(contents, prompts, strict=True):
            writer.append([prompt.ids], [[False] * len(prompt.ids)], content)
        return [len(prompt.ids) for prompt in prompts]
    names = RANKED if writer.form == "rankings" else RANKED[:2]
    pairs = tokenizer.render_pairs([(row["prompt"], [row[name] for name in names if name in row]) for row in contents])
    for content, (prompt, *responses) in zip(contents, pairs, strict=True):
        responses += [[]] * (len(names) - len(responses))  # nobody has edited the chosen one
        masks = [[False] * len(prompt), *([True] * len(response) for response in responses)]
        writer.append([prompt, *responses], masks, content)
    return [len(prompt) + max(map(len, responses)) for prompt, *responses in pairs]


# ---- tokens that are there ----


def _take_tokens(
    context: StageContext,
    settings: PrepareSettings,
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    report: SourceReport,
) -> None:
    """A source that `prepare` made before, of this run or another: its stores are linked, nothing is tokenised."""
    folder, known = prepared_source(source.config.path or "", source.where)
    path = prepared_facts(folder)
    assert path is not None, "the source is of the kind tokens"
    facts = json.loads(path.read_text("utf-8"))
    before, own = facts["sources"][known], settings.data.validation
    if facts["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            source.where,
            f"{source.config.path} was made with another tokenizer (sha {facts['tokenizer'][:8]}) than this run's "
            f"(sha {tokenizer.fingerprint[:8]})",
            f"Give the run that tokenizer ({_tokenizer_of(path.parent)}), or the rows that the tokens were made of",
        )
    asked = _asked(settings, name)
    if before["form"] not in ({asked} if asked == "rankings" else ACCEPTED[asked]):  # tokens of pairs lack the ratings
        what = f"{source.config.path} holds {before['form']}, {asked} is asked for"
        raise UserError(source.where, what, "Set data.form, or name another source")
    if facts["validation"] < own and "train" in settings.splits:
        what = f"of {source.config.path} {facts['validation']:g} of the rows were held out, {own:g} are asked for"
        raise UserError(source.where, what, f"Set data.validation={facts['validation']:g}, or prepare its rows again")
    report.form, report.layouts = before["form"], before.get("layouts", {})
    for split in settings.splits:
        if split not in before["splits"]:
            what = f"{source.config.path} was made without the split {split}"
            raise UserError(source.where, what, "Name another source, or prepare its rows again")
        link_store(folder / split, context.output / "sources" / name / split)
        report.splits[split] = before["splits"][split]
        store = TokenStore.open(folder / split)
        contexts = _contexts(settings, report)
        for row in np.flatnonzero(store.row_contexts > min(contexts)).tolist() if contexts else []:
            where = f"{source.config.path}: row {row + 1} of {split}"
            report.count_long(int(store.row_contexts[row]), where, contexts, settings.data.on_long)
    context.console.note(f"{name} is taken as tokens from {source.config.path}")


def _name_of(tokenizer: Path) -> str:
    """What the run calls a tokenizer: the directory or hub name that the artifact was copied from, or where it lies."""
    record = tokenizer / "stage.json"
    settings = json.loads(record.read_text("utf-8")).get("settings", {}) if record.is_file() else {}
    return settings.get("source") or str(tokenizer / "tokenizer")


def _tokenizer_of(artifact: Path) -> str:
    """Where the tokenizer of prepared tokens lies, as the setting that would name it."""
    record = artifact / "stage.json"
    inputs = json.loads(record.read_text("utf-8")).get("inputs", {}) if record.is_file() else {}
    path = inputs.get("tokenizer", {}).get("path")
    return f"model.tokenizer={path}/tokenizer" if path else "model.tokenizer=<its folder>"
