"""The scripts of benchmarks/ as modules."""

import json
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


@pytest.fixture
def shows_its_results():
    """A check that the page and the picture of a script have the figures of its result, of three seeds or more."""

    def check(script):
        result = json.loads(script.RESULT.read_text("utf-8"))
        page = Path(BENCHMARKS).parent / "docs" / "methods" / f"{script.RESULT.stem}.md"
        assert "\n".join(script.table(result)) in page.read_text("utf-8")
        assert len(result["seeds"]) >= 3
        drawn = script.PICTURE.read_text("utf-8")
        assert result["arms"].keys() == script.ARMS.keys()
        for arm, found in result["arms"].items():
            assert f"<!-- {arm}: {found['after']['mean']:.3f} -->" in drawn

    return check
