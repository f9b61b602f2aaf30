"""What a source's rows depend on, as a short string for the key of a stage. Standard library only: `plan` calls it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

from lightning_llm.data.config import SourceConfig
from lightning_llm.data.embedded import CONTENTS, REVISION
from lightning_llm.data.places import (
    datasets_files,
    datasets_folder,
    file_kind,
    prepared_source,
    source_files,
    split_path,
    store_files,
    visible_files,
)


def source_fingerprint(config: SourceConfig, where: str) -> str:
    """The content of a source: package versions of embedded text, sha256 of files, name and revision on a hub.

    A folder that `datasets` wrote counts by its Arrow files, not by the fingerprint it was saved with: that one tells
    how rows were made, and stays when a generator gives others or a file is exchanged.

    Args:
        where: the setting that names the source, for error messages.

    Raises:
        UserError: the source does not exist.
    """
    kind, rest = split_path(config.path, where)
    if kind == "embedded":
        versions = {package: _version(package) for package in CONTENTS[rest][1]}
        return f"embedded:{rest} " + json.dumps({"revision": REVISION, **versions}, sort_keys=True)
    if kind == "hub" and Path(rest).is_dir():
        return _of_files("folder", [f"{f.relative_to(rest)} {file_sha256(f)}" for f in visible_files(Path(rest))])
    if kind == "hub":  # a pinned revision makes sure of the content; asking for its commit would need the hub each time
        return f"hub:{rest}@{config.options.get('revision', 'main')}"
    if kind == "datasets":
        folder, _ = datasets_folder(rest, config.options.get("split"), where)
        return _of_files("datasets", [file_sha256(file) for file in datasets_files(folder)])
    if kind == "tokens":
        folder, _ = prepared_source(rest, where)
        return _of_files("tokens", [f"{f.relative_to(folder)} {file_sha256(f)}" for f in store_files(folder)])
    # its kind decides how a file is read, its name and place do not
    kinds = [(".".join(filter(None, file_kind(file) or ())), file) for file in source_files(rest, where)]
    return _of_files("files", [f"{kind} {file_sha256(file)}" for kind, file in kinds])


def _of_files(kind: str, contents: list[str]) -> str:
    return f"{kind}:" + hashlib.sha256("\n".join(contents).encode()).hexdigest()


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
