"""Extras that the documents, the Makefile and error messages name are there; `make` spares what is no environment."""

from __future__ import annotations

import itertools
import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = {"dev", "flash", "peers", "bench", "loggers", "notebooks", "vllm"}
PLACES = ("Makefile", ".ci/run", "*.md", "docs/**/*.md", "lightning_llm/**/*.py")


def test_extras_are_those_that_are_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(project["optional-dependencies"]) == EXTRAS
    named: dict[str, str] = {}
    for path in itertools.chain.from_iterable(map(ROOT.glob, PLACES)):
        for extras in re.findall(r"(?:['\"\s]\.|lightning-llm)\[([\w,-]+)\]", path.read_text("utf-8")):
            named |= dict.fromkeys(extras.split(","), path.name)
    assert {"dev", "loggers", "notebooks"} <= set(named)
    assert {extra: file for extra, file in named.items() if extra not in EXTRAS} == {}


def test_what_is_no_environment_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    made = subprocess.run(
        ["make", "demo", f"VENV={tmp_path}", "PYTHON=false"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode
    assert f"error: {tmp_path} is there and no environment" in made.stderr
    assert (tmp_path / "notes.txt").read_text() == "precious"
