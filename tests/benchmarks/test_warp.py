"""The page on WARP says what the committed results say; how fronts are compared, by hand."""

import json
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "warp.md"


def test_the_page_has_the_figures_of_the_results(benchmarks):
    import warp  # pyright: ignore[reportMissingImports]

    result = json.loads(warp.RESULT.read_text())
    page = PAGE.read_text("utf-8")
    assert "\n".join(warp.table(result["points"])) in page
    assert len(result["seeds"]) >= 3
    assert warp.PICTURE.is_file()
    assert warp.PICTURE.name in page


def test_fronts_are_compared_where_both_reach(benchmarks):
    import warp  # pyright: ignore[reportMissingImports]

    low = [{"kl": 0.0, "reward": 0.2}, {"kl": 1.0, "reward": 0.4}]
    high = [{"kl": 0.0, "reward": 0.2}, {"kl": 4.0, "reward": 0.5}, {"kl": 2.0, "reward": 0.8}]
    assert warp.reward_at(low, 0.5) == pytest.approx(0.3)
    assert warp.reward_at(low, 7) == 0.4
    assert warp.reward_at(high, 3) == pytest.approx(0.65)  # between the points at 2 and at 4
    seeds = [{"fronts": {"a": high, "b": low}}]
    assert warp.advantages(seeds, "a", "b") == pytest.approx([0.5 - 0.4])  # both at a KL of 1
    assert warp.advantages(seeds, "b", "a") == pytest.approx([-0.1])
