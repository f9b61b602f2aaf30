"""Picture and table of rejection sampling are those of the committed figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "rejection_sampling.md"


def test_the_picture_shows_the_changes_within_seeds(benchmarks):
    import rejection_sampling  # pyright: ignore[reportMissingImports]

    result = json.loads(rejection_sampling.RESULT.read_text())
    drawn = rejection_sampling.picture(result)
    assert drawn == rejection_sampling.PICTURE.read_text()
    before = result["before"]["tasks/exact_match"]
    after = {arm: found["after"]["tasks/exact_match"] for arm, found in result["arms"].items()}
    shown = [float(text) for text in re.findall(r">([+-][\d.]+)</text>", drawn)]
    assert shown == pytest.approx([found["mean"] - before["mean"] for found in after.values()], abs=5e-4)
    zero = float(re.search(r'<line x1="([\d.]+)"[^>]*class="zero"', drawn)[1])
    places = [float(place) for place in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    gains = [new - old for found in after.values() for new, old in zip(found["values"], before["values"], strict=True)]
    assert [place > zero for place in places] == [gain > 0 for gain in gains]


def test_the_page_has_the_table_of_the_results(benchmarks):
    import rejection_sampling  # pyright: ignore[reportMissingImports]

    result = json.loads(rejection_sampling.RESULT.read_text())
    assert "\n".join(rejection_sampling.table(result)) in PAGE.read_text("utf-8")
