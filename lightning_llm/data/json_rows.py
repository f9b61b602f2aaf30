"""Rows of JSON files: an object per line, or one array of objects; compressed or not. File and line name a row."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_llm.data.compression import PIECE, Damaged, read_lines, read_pieces
from lightning_llm.data.gauge import Tell
from lightning_llm.data.rows import SKIP, first_line
from lightning_llm.settings import UserError

SPACE = b" \t\r\n"
BETWEEN = re.compile(r"[\s,]*")  # the rows of an array
CUT = 16  # characters: an error this close to the end of what has been read may be a value cut in two


def read_json(path: Path, tell: Tell | None = None) -> Iterator[tuple[str, Any]]:
    """(where, what stands there or the error that stands for it) of each row.

    Args:
        tell: is told the share of the file that has been read.

    Raises:
        UserError: the file is damaged, or not what its name says.
    """
    return _array(path, tell) if ".json" in path.suffixes and _is_array(path) else _lines(path, tell)


def _lines(path: Path, tell: Tell | None) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, line in enumerate(read_lines(path, tell), 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _parsed(line, where)
    except Damaged as error:
        raise UserError(
            f"{path}:{number + 1}", f"cannot be read from here on ({error})", "Get the file again"
        ) from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return UserError(where, "is not UTF-8", f"Mend it, {SKIP}")
    except json.JSONDecodeError as error:
        what = f"is not JSON ({error.msg} at column {error.colno})"
        if where.endswith(":1") and line.lstrip()[:1] not in b"{[" and b"," in line:
            return UserError(where, f"{what}; it looks like the head of a CSV table", "Convert it to jsonl or parquet")
        return UserError(where, what, f"Write one object per line, {SKIP}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        return UserError(where, f"cannot be read ({first_line(error)})", f"Mend it, {SKIP}")


def _is_array(path: Path) -> bool:
    try:
        return (
            next((piece for piece in read_pieces(path) if piece.strip()), b"").lstrip(codecs.BOM_UTF8 + SPACE)[:1]
            == b"["
        )
    except Damaged:
        return False


def _array(path: Path, tell: Tell | None) -> Iterator[tuple[str, Any]]:
    """The elements of one array, each as soon as it is there; a row is named by the line that it begins in."""
    decoder, pieces = json.JSONDecoder(), _characters(path, tell)
    text, at, line = "", 0, 1
    while "[" not in text:
        text += next(pieces)
    text = text.replace("[", " ", 1)
    while True:
        begin = BETWEEN.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        line += text.count("\n", at, begin)
        if text.startswith("]", begin):
            return
        try:
            value, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            is_cut = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos >= len(text) - CUT
            )
            rest = text[begin:]
            more = "".join(islice(pieces, 1 + len(rest) // PIECE)) if is_cut else ""
            if not more:
                what = f"is not JSON ({first_line(error)})" if not is_cut else "the array has no end"
                raise UserError(f"{path}:{line}", what, "Mend the file, or write one object per line") from None
            text, at = rest + more, 0
            continue
        yield f"{path}:{line}", value
        line += text.count("\n", begin, end)
        at = end


def _characters(path: Path, tell: Tell | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for piece in read_pieces(path, tell):
            yield decoder.decode(piece)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"is not UTF-8 ({error.reason})", "Convert it") from error
    except Damaged as error:
        raise UserError(str(path), f"cannot be read to its end ({error})", "Get the file again") from error
