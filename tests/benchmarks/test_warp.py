"""How the benchmark of WARP compares fronts, by hand."""

import pytest


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
