"""Rows of text files: a file is a document, or each of its parts between blank lines is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_llm.data.compression import Damaged, read_lines, read_pieces
from lightning_llm.data.gauge import Tell
from lightning_llm.data.rows import SKIP
from lightning_llm.settings import UserError

DOCUMENTS = ("file", "paragraph")  # what a document is: the option `documents` of a source


def read_text(path: Path, documents: str = "file", tell: Tell | None = None) -> Iterator[tuple[str, Any]]:
    """(where, {"text": ...} or the error that stands for it) of each document.

    Args:
        documents: one of DOCUMENTS.
        tell: is told the share of the file that has been read.

    Raises:
        UserError: the file is damaged, or not what its name says.
    """
    try:
        if documents == "file":
            yield _document(b"".join(read_pieces(path, tell)), str(path))
        else:
            yield from _paragraphs(path, tell)
    except Damaged as error:
        raise UserError(str(path), f"cannot be read to its end ({error})", "Get the file again") from error


def _paragraphs(path: Path, tell: Tell | None) -> Iterator[tuple[str, Any]]:
    """A paragraph is named by the line that it begins in."""
    begun, first = [], 1
    for number, line in enumerate(read_lines(path, tell), 1):
        if line.strip():
            first = first if begun else number
            begun.append(line.rstrip(b"\r"))
        elif begun:
            yield _document(b"\n".join(begun), f"{path}:{first}")
            begun = []
    if begun:
        yield _document(b"\n".join(begun), f"{path}:{first}")


def _document(content: bytes, where: str) -> tuple[str, Any]:
    try:
        return where, {"text": content.decode("utf-8")}
    except UnicodeDecodeError as error:
        return where, UserError(where, f"is not UTF-8 (byte {error.start})", f"Convert it, {SKIP}")
