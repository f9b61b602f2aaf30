"""Run code that a model has written: a process of its own, with little time and memory, that can reach nothing.

With isolation by the kernel (Linux) the process has no capabilities, makes no system call but those that computing,
reading and writing take (seccomp), and writes only below a temporary folder that goes with it (Landlock): it starts no
other process, opens no socket, signals nobody, and changes no limit, mode or owner, and ends with whoever has started
it. It may read what its user may read: keep secrets elsewhere. The folder is a file system of its own with 64 MiB and
4,096 entries where the kernel lets its user mount one; elsewhere it may write many files while its time lasts, each no
larger than allowed.

Tests run in the same interpreter as the code. A verdict is a number drawn for the occasion, so that neither an exit
code nor anything printed passes for one; code that searches its own interpreter for that number can forge it, and
objects that claim to equal everything pass comparisons.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO

from lightning_llm.settings import UserError

CHILD = Path(__file__).with_name("sandboxed.py")
STARTING = 10.0  # seconds of the clock that a loaded machine may take to start an interpreter


@dataclass(frozen=True)
class Limits:
    """What a process may use."""

    seconds: float = 5.0  # of a processor; of the clock twice as many and STARTING
    memory_mib: int = 512
    file_mib: int = 1  # of any file
    by_kernel: bool = True


def passes(code: str, tests: str, limits: Limits) -> bool:
    """Whether `tests` run to their end after `code`, in the same module."""
    token, temporary = secrets.token_hex(16), tempfile.gettempdir()
    try:
        folder = tempfile.mkdtemp(prefix="lightning-llm-")
    except OSError as error:
        what = f"{temporary} takes no folder for a model's code ({error.strerror})"
        raise UserError("TMPDIR", what, "Make room there, or name another place") from error
    orders = {"code": code, "tests": tests, "token": token, "folder": folder, "parent": os.getpid(), **asdict(limits)}
    # Files, not pipes: what is written into a pipe has no limit, and whoever reads it keeps it in memory.
    with _in_memory() as ordered, _in_memory() as said:
        ordered.write(json.dumps(orders).encode())
        ordered.seek(0)
        try:
            with subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD)],
                stdin=ordered,
                stdout=said,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath},
                start_new_session=True,
            ) as process:
                try:
                    process.wait(2 * limits.seconds + STARTING)
                except subprocess.TimeoutExpired:
                    return False
                finally:
                    with suppress(ProcessLookupError):  # and what it has started, where the kernel did not forbid that
                        os.killpg(process.pid, signal.SIGKILL)
        finally:
            with suppress(OSError):  # no verdict is lost for what is left behind
                remove(Path(folder))
        said.seek(0)
        return said.read(len(token) + 1) == token.encode()


def _in_memory() -> IO[bytes]:
    """A file that no full disk can keep from being written."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("lightning-llm"), "w+b")
    return tempfile.TemporaryFile()


def remove(folder: Path) -> None:
    """Remove a folder that a model's code has filled: as deep as it likes, with folders that nobody may open.

    Folders inside folders are moved to the top, so that no path is long and nothing is recursive.

    Raises:
        OSError: something in it cannot be removed.
    """

    def open_up(name: str, parent: int) -> bool:
        """Let its owner into a folder; False if it is none."""
        if is_folder := stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.chmod(name, 0o700, dir_fd=parent)
        return is_folder

    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while names := os.listdir(top):
            for name in names:
                if not open_up(name, top):
                    os.unlink(name, dir_fd=top)
                    continue
                inside = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=top)
                try:
                    for other in os.listdir(inside):
                        if open_up(other, inside):
                            os.rename(other, secrets.token_hex(16), src_dir_fd=inside, dst_dir_fd=top)
                        else:
                            os.unlink(other, dir_fd=inside)
                finally:
                    os.close(inside)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    folder.rmdir()


@cache
def refuse_weak_kernel() -> None:
    """Raises UserError where seccomp or Landlock is missing."""
    why = ""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        why = f"{platform.system()} on {platform.machine()} has no seccomp and Landlock that are known here"
    elif not passes("", "", Limits()):
        why = "seccomp or Landlock is not to be had of this kernel"
    if why:
        raise UserError(
            "judge.isolation",
            why,
            "Run on Linux 6.2 or later, or choose isolation=limits and trust what the model writes",
        )
