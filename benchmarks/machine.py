"""What a figure was measured on: processor, versions, commit. Written beside every result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MEASURED = (".", ":!benchmarks/results", ":!docs")  # what figures depend on: not what earlier parts have written
LIBRARIES = ("torch", "lightning", "hydra-core", "numpy", "tokenizers", "transformers")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, versions of what does the work, commit, date."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "commit": commit,
        "uncommitted_changes": bool(changes),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def command(*arguments: str) -> list[str]:
    """`lightning-llm <arguments>`, in this interpreter: what the console script does, installed or not."""
    return [sys.executable, "-c", "import sys; from lightning_llm.cli import main; sys.exit(main())", *arguments]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
