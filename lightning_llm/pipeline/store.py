"""Finished artifacts by key: written aside, renamed when whole, checked when read, never changed, safe for many runs.

<root>/<kind>-<name>-<16 digits of the key>/   an artifact: the stage's files and stage.json
<root>/.making/                                what is being written, or was when its owner was killed
<root>/.locks/<key>                            held by whoever makes that key; the kernel frees it if he is killed
<root>/.locks/<key>.reading                    shared by all who read it: it is neither replaced nor removed meanwhile
<root>/.runs/                                  links to the run folders that use this store, wherever they lie
<root>/.checked/<artifact>.json                size, time and inode of files whose content has been hashed
<root>/.damaged/                               artifacts that were altered; nothing uses them
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_llm.settings import UserError

RECORD = "stage.json"


@dataclass
class Claim:
    """The right to make one key: either the artifact that is there, or a folder to fill and `commit`."""

    store: Store
    kind: str
    name: str
    key: str
    found: Path | None
    folder: Path
    lost: list[str] = field(default_factory=list)  # what was wrong with the artifact that was there

    def commit(self, record: dict[str, Any]) -> Path:
        """Make the folder an artifact: list its files, write stage.json, sync to disk, rename.

        Args:
            record: of stage.json; `files` is added.
        """
        files = {}
        for path in _files(self.folder):
            files[path.relative_to(self.folder).as_posix()] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
            _sync(path)
        text = json.dumps(record | {"files": files}, indent=2, ensure_ascii=False)
        (self.folder / RECORD).write_text(text + "\n", "utf-8")
        _sync(self.folder / RECORD)
        for folder in sorted({path.parent for path in _files(self.folder)} | {self.folder}):
            _sync(folder)
        final = self.store.place(self.kind, self.name, self.key)
        with self.store.unread(self.key):
            if self.found is not None:  # made again
                self.store.set_aside(self.found, self.store.root / ".making")
            self.folder.rename(final)
        _sync(self.store.root)
        self.store.remember(final)
        return final


class Store:
    """A folder of artifacts."""

    def __init__(self, root: Path | str):
        """
        Raises:
            UserError: there is something else than a folder.
        """
        self.root = Path(root).expanduser().absolute()
        if self.root.exists() and not self.root.is_dir():
            raise UserError("store.root", f"{self.root} cannot be a folder", "Name a folder of your own")

    def make(self) -> None:
        """Make the store's folder where there is none.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"{self.root} cannot be made ({error.strerror})"
            raise UserError("store.root", what, "Name a folder of your own") from error

    def place(self, kind: str, name: str, key: str) -> Path:
        """Where an artifact of this key lies, or would. The name of its node is for the reader; the key decides."""
        found = sorted(self.root.glob(f"{kind}-*-{key[:16]}"))
        return found[0] if found else self.root / f"{kind}-{name}-{key[:16]}"

    def find(self, kind: str, name: str, key: str) -> Path | None:
        """The artifact of a key, if it is there and whole."""
        path = self.place(kind, name, key)
        return path if path.is_dir() and not self.faults(path, key) else None

    @contextmanager
    def claim(
        self,
        kind: str,
        name: str,
        key: str,
        *,
        again: bool = False,
        keeps: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[Claim]:
        """Look for a key, and hold it against all others until the block ends.

        Args:
            again: make it even if it is there; what is there stays until the new one is whole.
            keeps: what is half-written stays where it is, and is handed to whoever makes this key next. For verbs whose
                files do not tell where they were interrupted.
            waiting: called once if another process makes this key at the moment.
        """
        with self._locked(key, fcntl.LOCK_EX, waiting):
            if not keeps or again:
                self._sweep(key)
            path = self.place(kind, name, key)
            lost = self.faults(path, key) if path.is_dir() else []
            if lost:
                self.set_aside(path, self.root / ".damaged")
            found = path if path.is_dir() else None
            begun = sorted((self.root / ".making").glob(f"{kind}-*-{key[:16]}"))  # by a run that gave it another name
            folder = begun[0] if begun else self.root / ".making" / f"{kind}-{name}-{key[:16]}"
            if found is None or again:
                folder.mkdir(parents=True, exist_ok=bool(begun))
                (folder / RECORD).unlink(missing_ok=True)  # of one that was killed just before it was renamed
            try:
                yield Claim(self, kind, name, key, found, folder, lost)
            except BaseException:
                if not keeps:
                    self._sweep(key)
                raise
            self._sweep(key)

    @contextmanager
    def reading(self, keys: Iterable[str]) -> Iterator[None]:
        """Keep artifacts from being replaced or removed until the block ends. Any number may read at a time."""
        with ExitStack() as locks:
            for key in keys:
                locks.enter_context(self._locked(f"{key}.reading", fcntl.LOCK_SH))
            yield

    def unread(self, key: str) -> AbstractContextManager[None]:
        """Wait until nobody reads an artifact, and let nobody begin until the block ends."""
        return self._locked(f"{key}.reading", fcntl.LOCK_EX)

    @contextmanager
    def _locked(self, name: str, how: int, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        (self.root / ".locks").mkdir(parents=True, exist_ok=True)
        with (self.root / ".locks" / name).open("w") as file:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, how)
            yield  # closing the file frees it

    def _sweep(self, key: str) -> None:
        """Remove what was left half-written of a key; its lock is ours, so nobody writes it."""
        for path in (self.root / ".making").glob(f"*-{key[:16]}*"):
            shutil.rmtree(path)

    def set_aside(self, path: Path, folder: Path) -> None:
        """Move an artifact into a folder, under a name that is not taken there."""
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / f"{path.name}-{uuid.uuid4().hex[:8]}")

    # ---- is it whole ----

    def faults(self, path: Path, key: str | None = None, *, deep: bool = False) -> list[str]:
        """What is wrong with an artifact; empty if it is whole.

        Files, sizes and contents are compared with stage.json; a content is hashed again only where size, time of
        change or inode are not those of the last time.

        Args:
            key: what it should be; none: any.
            deep: hash everything.
        """
        record = read_record(path)
        if record is None:
            return [f"{RECORD} is missing or cannot be read"]
        if key is not None and record["key"] != key:
            return [f"{RECORD} is of another key"]
        if not path.name.endswith(f"-{record['key'][:16]}"):
            return [f"{RECORD} is of another key"]
        there = {
            file.relative_to(path).as_posix(): file
            for file in _files(path)
            if file.name != RECORD or file.parent != path
        }
        listed = record["files"]
        faults = [f"{name} is missing" for name in listed if name not in there]
        faults += [f"{name} does not belong to it" for name in there if name not in listed]
        checked = {} if deep else self._remembered(path)
        hashed = False
        for name in sorted(listed.keys() & there.keys()):
            state = _state(there[name])
            if state[0] != listed[name]["bytes"]:
                faults.append(f"{name} has {state[0]:,} bytes instead of {listed[name]['bytes']:,}")
            elif checked.get(name) != state:
                hashed = True
                if _sha256(there[name]) != listed[name]["sha256"]:
                    faults.append(f"{name} has been altered")
        if hashed and not faults:
            self.remember(path)
        return faults

    def remember(self, path: Path) -> None:
        """Note that the content of an artifact's files is as stage.json says."""
        states = {file.relative_to(path).as_posix(): _state(file) for file in _files(path)}
        note = self.root / ".checked" / f"{path.name}.json"
        note.parent.mkdir(exist_ok=True)
        temporary = note.with_suffix(f".{uuid.uuid4().hex[:8]}")
        temporary.write_text(json.dumps(states))
        temporary.rename(note)

    def _remembered(self, path: Path) -> dict[str, list[int]]:
        try:
            return json.loads((self.root / ".checked" / f"{path.name}.json").read_text())
        except (OSError, ValueError):
            return {}

    # ---- list, remove ----

    def artifacts(self) -> list[Path]:
        """All artifacts' folders, by name."""
        return sorted(path for path in self.root.glob("*-*") if path.is_dir()) if self.root.is_dir() else []

    def named(self, names: list[str]) -> list[Path]:
        """Artifacts by folder, path or the beginning of their key; all for no names.

        Raises:
            UserError: a name is that of none, or of several.
        """
        everything = self.artifacts()
        if not names:
            return everything
        chosen = []
        for name in names:
            last = Path(name).name
            found = [path for path in everything if path.name == last]
            found = found or [path for path in everything if path.name.rpartition("-")[2].startswith(last)]
            if len(found) != 1:
                what = "is the name of no artifact" if not found else f"is the name of {len(found)} artifacts"
                raise UserError(name, f"{what} in {self.root}", "See lightning-llm store list")
            chosen += found
        return chosen

    def register(self, run: Path) -> None:
        """Remember a run folder: what it links to is not removed unasked, whoever shares the store."""
        link = self.root / ".runs" / hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(run.absolute())

    def referring_runs(self, runs: Path) -> dict[Path, list[Path]]:
        """Artifact -> run folders that link to it: those that are registered, and those below `runs`."""
        folders = {link.resolve(): link.resolve() for link in (self.root / ".runs").glob("*") if link.is_dir()}
        folders |= {folder.resolve(): folder for folder in runs.glob("*/*")}  # shown as the user spells it
        found: dict[Path, list[Path]] = {}
        for folder in sorted(folders.values()):
            for link in sorted((folder / "artifacts").glob("*")):
                if link.is_symlink():
                    runs_of = found.setdefault(link.resolve(), [])
                    if folder not in runs_of:  # two nodes of a run may share an artifact
                        runs_of.append(folder)
        return found

    def last_taken(self, artifact: Path) -> int:
        """When a run that is registered last made or took an artifact, in nanoseconds; else when it was made."""
        links = (
            link.lstat().st_mtime_ns
            for run in (self.root / ".runs").glob("*")
            for link in (run / "artifacts").glob("*")
            if link.is_symlink() and link.resolve() == artifact.resolve()
        )
        return max(links, default=(artifact / RECORD).stat().st_mtime_ns)

    def remove(self, path: Path) -> None:
        """Remove an artifact; whoever makes, replaces or reads it at the moment is waited for."""
        record = read_record(path)
        key = record["key"] if record else path.name
        with self._locked(key, fcntl.LOCK_EX), self.unread(key):
            aside = self.root / ".making" / f"removed-{uuid.uuid4().hex}"
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
            shutil.rmtree(aside)
            (self.root / ".checked" / f"{path.name}.json").unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any] | None:
    """stage.json of an artifact; None if there is none that can be read."""
    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"key", "files"} <= record.keys() else None


def size_of(path: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in _files(path))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
