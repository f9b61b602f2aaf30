"""Run code that a model has written: a process of its own, with little time and memory, that can reach nothing.

With isolation by the kernel (Linux) the process has no capabilities, makes no system call but those that computing,
reading and writing take (seccomp), and writes only below a temporary folder that goes with it (Landlock): it starts no
other process, opens no socket, signals nobody, and changes no limit, mode or owner. It may read what its user may read:
keep secrets elsewhere. It may write many files while its time lasts, each no larger than allowed.

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
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

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
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="lightning-llm-") as folder:
        orders = json.dumps({"code": code, "tests": tests, "token": token, "folder": folder, **asdict(limits)})
        with subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(orders.encode(), timeout=2 * limits.seconds + STARTING)
            except subprocess.TimeoutExpired:
                said = b""
            finally:
                with suppress(ProcessLookupError):  # with whatever it has started, where the kernel did not forbid that
                    os.killpg(process.pid, signal.SIGKILL)
    return said == token.encode()


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
