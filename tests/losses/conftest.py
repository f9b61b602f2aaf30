"""What tests of the losses measure in a process of its own: the peak of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
MEASURED = """
import torch

def status(key):  # MB
    return next(int(line.split()[1]) / 1e3 for line in open("{status}") if line.startswith(key))

vocabulary, width = {vocabulary}, {width}
{step}
step(8, 64)  # what the libraries take once
before = step({count}, vocabulary)
print(status("VmHWM") - before - vocabulary * width * 4 / 1e6)
"""


@pytest.fixture
def peak_of():
    """`peak_of(step, count, vocabulary, width)` -> MB at the peak, above what was there and the head's gradient.

    Args:
        step: the source of `step(count, vocabulary)`, which may use `width`, makes its tensors of so many tokens and
            ids, remembers `before = status("VmRSS")`, goes forward and backward, and returns `before`.
    """
    if not STATUS.exists():
        pytest.skip("reads the peak of memory from Linux's /proc")

    def measured(step: str, count: int, vocabulary: int, width: int) -> float:
        named = {"status": STATUS, "step": step, "count": count, "vocabulary": vocabulary, "width": width}
        command = [sys.executable, "-c", MEASURED.format(**named)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        return float(done.stdout)

    return measured
