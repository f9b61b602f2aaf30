"""The scripts of benchmarks/ as modules."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture
def benchmarks(monkeypatch):
    """They may be imported by name while the test runs, and are forgotten after it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(BENCHMARKS):
            del sys.modules[name]
