"""The picture of pruned beginnings is that of the committed figures, and claims are what the arms' losses say."""

from __future__ import annotations

import json
import re

import pytest


def test_the_picture_shows_the_losses(benchmarks):
    import pruning  # pyright: ignore[reportMissingImports]

    result = json.loads(pruning.RESULT.read_text())
    drawn = pruning.picture(result)
    assert drawn == pruning.PICTURE.read_text()
    ends = dict(re.findall(r">([\d.]+)  ([^<]+)</text>", drawn))
    assert sorted(ends.values()) == sorted(result["arms"])
    places = {}
    for line, (name, arm) in zip(re.findall(r'points="([^"]+)"', drawn), result["arms"].items(), strict=True):
        last = [float(number) for number in line.split()[-1].split(",")]
        assert last[0] == pytest.approx(490, abs=0.1)  # where the picture's tokens end
        places[name] = (last[1], arm["curve"][-1])
    lowest_first = sorted(places, key=lambda name: -places[name][0])
    assert lowest_first == sorted(places, key=lambda name: places[name][1])


def test_a_claim_is_the_least_gain_of_a_seed(benchmarks):
    import pruning  # pyright: ignore[reportMissingImports]

    def run(*losses, masks=False):
        stage = {"curve": list(zip((0, 100), losses, strict=True)), "seconds": 1.0, "metrics": {"masks/hardness": 0.9}}
        return {"parent": stage, "core": stage} | ({"masks": stage} if masks else {})

    runs = {
        "from scratch": [run(7.0, 5.0), run(7.0, 5.2)],
        "magnitude": [run(6.0, 4.9), run(6.0, 5.3)],
        "activation": [run(6.0, 4.8), run(6.0, 4.9)],
        "learnt masks": [run(6.0, 4.7, masks=True), run(6.0, 4.9, masks=True)],
    }
    found = pruning.summarise(runs)
    assert [entry["value"] for entry in found["claims"]] == pytest.approx([-0.1, 0.2, 0.3])
    assert [entry["holds"] for entry in found["claims"]] == [False, True, True]
    assert found["arms"]["activation"]["after"]["mean"] == pytest.approx(4.85)
