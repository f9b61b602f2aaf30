"""The picture of rejection sampling is that of the committed figures."""

from __future__ import annotations

import json
import re

import pytest


def test_the_picture_shows_the_changes_within_seeds(benchmarks):
    import rejection_sampling  # pyright: ignore[reportMissingImports]

    result = json.loads(rejection_sampling.RESULT.read_text())
    drawn = rejection_sampling.picture(result)
    assert drawn == rejection_sampling.PICTURE.read_text()
    shown = [float(text) for text in re.findall(r">([+-][\d.]+)</text>", drawn)]
    start = result["before"]["tasks/exact_match"]["mean"]
    means = [arm["after"]["tasks/exact_match"]["mean"] - start for arm in result["arms"].values()]
    assert shown == pytest.approx(means, abs=5e-4)
    zero = float(re.search(r'<line x1="([\d.]+)"[^>]*class="zero"', drawn)[1])
    places = [float(place) for place in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    seeds = len(result["seeds"])
    before = result["before"]["tasks/exact_match"]["values"]
    for arm, found in enumerate(result["arms"].values()):
        after = found["after"]["tasks/exact_match"]["values"]
        gains = [value > start for value, start in zip(after, before, strict=True)]
        assert [place > zero for place in places[arm * seeds : (arm + 1) * seeds]] == gains
