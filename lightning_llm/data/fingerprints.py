"""What a source's rows depend on, as a short string for the key of a stage. Standard library only: `plan` calls it."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

from lightning_llm.data.config import SourceConfig
from lightning_llm.data.embedded import CONTENTS, OPTIONS, REVISION
from lightning_llm.settings import UserError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}


def source_fingerprint(config: SourceConfig, where: str) -> str:
    """The content of a source: package versions of embedded text, sha256 of files, name and revision on a hub.

    Args:
        where: the setting that names the source, for error messages.

    Raises:
        UserError: the source does not exist.
    """
    kind, rest = split_path(config.path, where)
    if kind == "embedded":
        versions = {package: _version(package) for package in CONTENTS[rest][1]}
        return f"embedded:{rest} " + json.dumps({"revision": REVISION, **versions}, sort_keys=True)
    if kind == "hub":
        return f"hub:{rest}@{config.options.get('revision', 'main')}"  # pin a revision to make sure of the content
    # its kind decides how a file is read, its name and place do not
    hashes = [f"{SUFFIXES[path.suffix.lower()]} {file_sha256(path)}" for path in source_files(rest, where)]
    return "files:" + hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def split_path(path: str | None, where: str) -> tuple[str, str]:
    """("embedded", name), ("hub", org/name) or ("files", path or pattern)."""
    if not path:
        raise UserError(f"{where}.path", "names nothing", "Give a file, a pattern, hub:<org>/<name> or embedded:<name>")
    kind, colon, rest = path.partition(":")
    if colon and kind == "embedded" and rest not in CONTENTS:
        raise UserError(f"{where}.path", f"there is no {path}", f"Embedded are {', '.join(CONTENTS)}")
    return (kind, rest) if colon and kind in ("embedded", "hub") else ("files", path)


def source_options(path: str, where: str) -> tuple[str, ...]:
    """Names that `options` may hold for a path: a hub's split, config and revision, an embedded source's own."""
    kind, rest = split_path(path, where)
    if kind == "embedded":
        return OPTIONS[CONTENTS[rest][0]]
    return ("split", "config", "revision") if kind == "hub" else ()


def source_files(pattern: str, where: str) -> list[Path]:
    """The files of a path or glob pattern, sorted; of a folder all that can be read.

    Raises:
        UserError: there are none, or one is of a kind that cannot be read.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
    else:
        files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"{where}.path", f"there is no file {pattern}", "Name existing files")
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(str(file), "is of an unknown kind", f"Give files ending in {', '.join(SUFFIXES)}")
    return files


def file_sha256(path: Path, cache: Path | None = None) -> str:
    """sha256 of a file; remembered on disk for as long as its size, time of change and inode stay the same."""
    cache = cache or _cache_file()
    stat = path.stat()
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    key = str(path.resolve())
    known = _read_cache(cache)
    if key in known and known[key][:3] == state:
        return known[key][3]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    _write_cache(cache, {**_read_cache(cache), key: [*state, digest.hexdigest()]})
    return digest.hexdigest()


def _version(package: str) -> str:
    return platform.python_version() if package == "python" else importlib.metadata.version(package)


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lightning_llm" / "sha256.json"


def _read_cache(cache: Path) -> dict[str, list]:
    try:
        return json.loads(cache.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _write_cache(cache: Path, content: dict[str, list]) -> None:
    temporary = cache.with_suffix(f".{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), "utf-8")
        temporary.replace(cache)
    except OSError:  # a home that cannot be written costs time, not correctness
        with contextlib.suppress(OSError):
            temporary.unlink()
