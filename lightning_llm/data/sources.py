"""Rows out of every source: embedded, the user's jsonl, parquet and text files, a hub. What a row is, is decided here.

A row is one of four forms, told by its fields, and comes out in the same shape wherever it was read:
    text           {"text": str}
    conversations  {"messages": [{"role", "content"}, ...]}              also from {"prompt", "completion"}
    pairs          {"prompt": messages, "chosen": str, "rejected": str}  also with a conversation as each of both
    questions      {"prompt": messages, "answer": str, "task": str}      to be answered and scored; nothing is learnt
A row that is malformed comes out as the UserError that names its file and line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_llm.data.config import SourceConfig
from lightning_llm.data.embedded import CONTENTS, OPTIONS, tasks, text
from lightning_llm.data.fingerprints import SUFFIXES, source_files, source_fingerprint, split_path
from lightning_llm.data.tokenizer import Message
from lightning_llm.settings import UserError

FORMS = ("text", "conversations", "pairs", "questions")
ROLES = ("system", "user", "assistant", "tool")
SKIP = "or leave such rows out with data.on_error=skip"


@dataclass(frozen=True)
class Row:
    """One row and where it came from."""

    where: str  # "pairs.jsonl:1374", "embedded:code argparse.py"
    form: str  # one of FORMS
    content: dict[str, Any]
    split: str | None = None  # "train" or "validation" where the source decides; otherwise a hash of the content does

    def is_held_out(self, share: float) -> bool:
        """Whether the row belongs to the held-out `share`: the same answer wherever and whenever it is asked."""
        if self.split is not None:
            return self.split == "validation"
        shared = self.content.get("prompt", self.content)  # no prompt of a pair or question is in both splits
        identity = json.dumps(shared, sort_keys=True, ensure_ascii=False)
        digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class Source:
    """A source that has been found, and can be read as often as one likes."""

    config: SourceConfig
    where: str  # the setting that names it, for error messages
    fingerprint: str

    def rows(self, splits: Sequence[str] = ("train", "validation")) -> Iterator[Row | UserError]:
        """All rows, and errors in place of malformed ones; at most `max_rows` good ones.

        Args:
            splits: what will be used. A source that makes its rows then makes no others; files give all their rows.
        """
        kind, rest = split_path(self.config.path, self.where)
        if kind == "embedded":
            rows = _embedded(rest, self.config.options, splits, self.where)
        elif kind == "hub":
            rows = self._checked(_hub(rest, self.config.options, self.where))
        else:
            rows = self._checked(_files(source_files(rest, self.where)))
        limit = float("inf") if self.config.max_rows is None else self.config.max_rows
        count = 0
        for row in rows:
            if count >= limit:
                return
            count += isinstance(row, Row)
            yield row

    def _checked(self, found: Iterator[tuple[str, Any]]) -> Iterator[Row | UserError]:
        for where, fields in found:
            if isinstance(fields, UserError):
                yield fields
                continue
            try:
                yield read_row(fields, self.config.columns, where)
            except UserError as error:
                yield error


def open_source(config: SourceConfig, where: str) -> Source:
    """Find a source. Nothing is read but what its fingerprint needs.

    Args:
        where: the setting that names the source, as `data.sources.mine`.

    Raises:
        UserError: it does not exist, or there is no reader for it.
    """
    return Source(config, where, source_fingerprint(config, where))


# ---- a row ----


def read_row(fields: Any, columns: dict[str, str], where: str) -> Row:
    """Check one row and bring it into its form's shape.

    Args:
        fields: what the file holds.
        columns: our field -> the file's column, where they differ.
        where: file and line.

    Raises:
        UserError: it is none of the forms, or a field is not what it should be.
    """
    if not isinstance(fields, dict):
        raise UserError(where, f"is {_kind(fields)} and not an object with fields", f"Mend it, {SKIP}")
    for theirs in columns.values():
        if theirs not in fields:
            raise _no_field(where, theirs, fields)
    row = {**fields, **{ours: fields[theirs] for ours, theirs in columns.items()}}
    row = {name: value for name, value in row.items() if value is not None}  # a column that a table leaves empty
    if "chosen" in row or "rejected" in row:
        return Row(where, "pairs", _pair(row, where))
    if "messages" in row:
        return Row(where, "conversations", {"messages": _conversation(row, where)})
    if "prompt" in row and "completion" in row:
        prompt, completion = _messages(row, "prompt", where), _messages(row, "completion", where, "assistant")
        return Row(where, "conversations", {"messages": prompt + completion})
    if "prompt" in row and "answer" in row:
        question = {"prompt": _messages(row, "prompt", where), "answer": _string(row, "answer", where)}
        return Row(where, "questions", {**question, "task": str(row.get("task", "questions"))})
    if "text" in row:
        return Row(where, "text", {"text": _string(row, "text", where)})
    raise _no_field(where, "completion" if "prompt" in row else "text", row)


def _pair(row: dict[str, Any], where: str) -> dict[str, Any]:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise _no_field(where, name, row)
    if "prompt" in row:
        prompt = _messages(row, "prompt", where)
        answers = {name: _answer(row, name, prompt, where) for name in ("chosen", "rejected")}
    else:  # two whole conversations: what they share is the prompt
        chosen, rejected = _messages(row, "chosen", where), _messages(row, "rejected", where)
        if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
            raise UserError(where, 'has no "prompt", and chosen and rejected differ before their last turn',
                            f"Give the prompt as a field, {SKIP}")  # fmt: skip
        prompt, answers = chosen[:-1], {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    known = {name: row[name] for name in ("answer", "task") if name in row}  # for a judge of correctness
    return {"prompt": prompt, **answers, **known}


def _answer(row: dict[str, Any], name: str, prompt: list[Message], where: str) -> str:
    """The assistant's turn that `chosen` or `rejected` is, alone or behind the prompt."""
    *before, answer = _messages(row, name, where, "assistant")
    if answer["role"] != "assistant":
        raise UserError(where, f'"{name}" does not end in a turn of the assistant', f"Mend it, {SKIP}")
    if before and before != prompt:
        what = f'"{name}" has turns before its answer that are not those of "prompt"'
        raise UserError(where, what, f"Leave the prompt out, or give the answer alone, {SKIP}")
    return answer["content"]


def _conversation(row: dict[str, Any], where: str) -> list[Message]:
    messages = _messages(row, "messages", where)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(where, "the assistant says nothing, so there is nothing to learn", f"Mend it, {SKIP}")
    return messages


def _messages(row: dict[str, Any], name: str, where: str, role: str = "user") -> list[Message]:
    """A field as messages: as they are, or a string as one message of `role`."""
    value = row[name]
    if isinstance(value, str):
        return [{"role": role, "content": _string(row, name, where)}]
    if not isinstance(value, list) or not value:
        raise UserError(where, f'"{name}" is {_kind(value)} and not text or a list of messages', f"Mend it, {SKIP}")
    messages = []
    for turn, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise UserError(where, f'turn {turn} of "{name}" has no role and content', f"Mend it, {SKIP}")
        if message["role"] not in ROLES:
            known = f"Use {', '.join(ROLES)}"
            raise UserError(where, f'turn {turn} of "{name}" has the role {message["role"]!r}', f"{known}, {SKIP}")
        if not isinstance(message["content"], str):
            what = f'turn {turn} of "{name}" has {_kind(message["content"])} as content and not text'
            raise UserError(where, what, f"Mend it, {SKIP}")
        content = _encodable(message["content"], f'turn {turn} of "{name}"', where)
        messages.append({"role": message["role"], "content": content})
    return messages


def _string(row: dict[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise UserError(where, f'"{name}" is {_kind(value)} and not text', f"Mend it, {SKIP}")
    if not value.strip():
        raise UserError(where, f'"{name}" is empty', f"Fill it, {SKIP}")
    return _encodable(value, f'"{name}"', where)


def _encodable(value: str, what: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"{what} holds half a character at {error.start} (a lone surrogate)"
        raise UserError(where, half, f"Mend it, {SKIP}") from None
    return value


def _no_field(where: str, name: str, row: dict[str, Any]) -> UserError:
    found = ", ".join(map(str, row)) or "nothing"
    return UserError(where, f'no field "{name}" (found: {found})', f"Add it, name its column in `columns`, {SKIP}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# ---- readers: (where, fields or the error that stands for them) ----


def _files(paths: list[Path]) -> Iterator[tuple[str, Any]]:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]]
    readers = {"jsonl": _jsonl, "parquet": _parquet, "text": _text_file}
    for path in paths:
        yield from readers[SUFFIXES[path.suffix.lower()]](path)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if line.strip():
                try:
                    yield where, json.loads(line)
                except UnicodeDecodeError:
                    yield where, UserError(where, "is not UTF-8", f"Mend it, {SKIP}")
                except json.JSONDecodeError as error:
                    what = f"is not JSON ({error.msg} at column {error.colno})"
                    yield where, UserError(where, what, f"Write one object per line, {SKIP}")
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
                    yield where, UserError(where, f"cannot be read ({_first_line(error)})", f"Mend it, {SKIP}")


def _text_file(path: Path) -> Iterator[tuple[str, Any]]:
    """A whole file is a document."""
    try:
        yield str(path), {"text": path.read_bytes().decode("utf-8")}
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start})"
        yield str(path), UserError(str(path), what, f"Convert it, {SKIP}")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, fields in enumerate(rows, 1):
            yield f"{path}: row {number}", fields
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(str(path), f"cannot be read as parquet ({_first_line(error)})", "Write it again") from error


def _hub(name: str, options: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Rows of a data set on the Hugging Face hub; options: split, config, revision."""
    import datasets
    from datasets.exceptions import DatasetsError

    split = options.get("split", "train")
    try:
        rows = datasets.load_dataset(
            name, options.get("config"), split=split, revision=options.get("revision"), streaming=True
        )
        for number, fields in enumerate(rows, 1):
            yield f"hub:{name} {split} row {number}", fields
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{where}.path",
            f"hub:{name} cannot be read ({_first_line(error)})",
            "Check the name and the connection, or download the files and give their path",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _embedded(name: str, options: dict[str, Any], splits: Sequence[str], where: str) -> Iterator[Row]:
    """Rows that come with the installation.

    Options: of text max_bytes; of instructions and preferences rows, held_out (rows), seed; of tasks task (one of
    the four; none: all), questions (held-out ones of each task), seed.
    """
    form, _ = CONTENTS[name]
    for option in options:
        if option not in OPTIONS[form]:
            known = f"embedded:{name} has {', '.join(sorted(OPTIONS[form]))}"
            raise UserError(f"{where}.options.{option}", "is not an option of this source", known)
    origin = f"embedded:{name}"
    if form == "text":
        for key, document in text.documents(name, **options):
            split = "validation" if text.is_held_out(name, key) else "train"
            yield Row(f"{origin} {key}", form, {"text": document}, split)
        return
    seed = options.get("seed", 0)
    if form == "questions":
        chosen = [options["task"]] if options.get("task") else list(tasks.TASKS)
        if unknown := set(chosen) - set(tasks.TASKS):
            raise UserError(f"{where}.options.task", f"there is no task {unknown}", f"Take {', '.join(tasks.TASKS)}")
        for split in splits:
            for task in chosen:
                for question in tasks.questions(split, task, options.get("questions", 150), seed):
                    content = {key: question[key] for key in ("answer", "task")}
                    content["prompt"] = [{"role": "user", "content": question["question"]}]
                    yield Row(f"{origin} {question['question']}", form, content, split)
        return
    for split in splits:
        count = options.get("rows", 20_000 if form == "conversations" else 4_000)
        count = count if split == "train" else options.get("held_out", 400)
        if form == "conversations":
            conversations = tasks.instructions(split, count, seed, options.get("multi_turn", 0.15))
            for number, messages in enumerate(conversations):
                yield Row(f"{origin} {split} {number}", form, {"messages": messages}, split)
        else:
            for number, pair in enumerate(tasks.preferences(split, count, seed)):
                content = {key: pair[key] for key in ("chosen", "rejected", "answer", "task")}
                content["prompt"] = [{"role": "user", "content": pair["question"]}]
                yield Row(f"{origin} {split} {number}", form, content, split)
