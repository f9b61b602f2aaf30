"""How the benchmark of WARP compares fronts, by hand."""

from pathlib import Path

import pytest

from lightning_llm import compose, plan

METHODS = Path(__file__).resolve().parents[2] / "docs" / "methods"


def test_a_single_policy_has_the_prompts_and_the_rate_of_a_policy_in_two_rounds(benchmarks):
    import warp  # pyright: ignore[reportMissingImports]

    stages = plan(compose("warp", overrides=[*warp.SINGLE, *warp.WORDS])).recipe.stages
    single, rounds = stages["single"], [stages[f"warp{n}.one"] for n in (1, 2)]
    assert single.examples == sum(each.examples for each in rounds) == 2 * warp.PROMPTS
    for each in rounds:
        for name in ("prompts", "per_prompt", "epochs", "sampling"):
            assert getattr(single.rollout, name) == getattr(each.rollout, name), name
        assert single.lr.peak == pytest.approx(each.lr.peak)
        assert single.objective == each.objective
        assert single.judge == each.judge
    assert single.rollout.reference != rounds[0].rollout.reference  # the one thing that differs is the anchor


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


def test_the_picture_has_a_panel_of_fronts_for_each_seed(benchmarks, tmp_path, monkeypatch):
    import warp  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(warp, "PICTURE", tmp_path / "warp.svg")
    spread = {"values": [0.1, 0.2]}
    points = {name: {"reward": spread, "kl": spread} for name in ("warp1.one", "warp1.two", "warp1.lerp")}
    front = [{"kl": 0.0, "reward": 0.2}, {"kl": 1.0, "reward": 0.4}]
    warp.draw({"points": points, "fronts": [dict.fromkeys(warp.FRONTS, front)] * 2})
    drawn = warp.PICTURE.read_text()
    assert all(f"<!-- {name} -->" in drawn for name in warp.FRONTS)
    assert drawn.count("<!-- lerp -->") == drawn.count("<!-- reward -->") == 2
    assert warp.table({"points": points})[2] == "| warp1.one | 0.100, 0.200 | 0.10, 0.20 |"


def test_the_page_has_the_figures_of_the_results(benchmarks):
    import claims  # pyright: ignore[reportMissingImports]
    import trials  # pyright: ignore[reportMissingImports]
    import warp  # pyright: ignore[reportMissingImports]

    result = trials.read(claims.RESULTS / "warp.json")
    assert "\n".join(warp.table(result)) in (METHODS / "warp.md").read_text("utf-8")
    assert len(result["seeds"]) == len(result["fronts"]) >= 3
