"""Models that differ in one setting, what they become together, and what is said of both."""

from pathlib import Path

import pytest

from lightning_llm import compose, plan

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_the_three_differ_in_one_setting_each():
    import averaging  # pyright: ignore[reportMissingImports]

    nodes = {node.name: node for node in plan(compose("qwen2", overrides=averaging.words())).nodes}
    first, order, strength = (vars(nodes[name].settings) for name in averaging.SINGLE)
    rates = [each["lr"].warmup_share for each in (first, order, strength)]
    assert rates == pytest.approx([rates[0]] * 3)
    assert [name for name in first if name != "lr" and order[name] != first[name]] == ["seed"]
    assert [name for name in first if name != "lr" and strength[name] != first[name]] == ["objective"]
    assert {nodes[name].inputs["starts_from"] for name in averaging.SINGLE} == {"sft"}
    for name in averaging.MERGED:
        assert nodes[name].inputs.get("starts_from", "sft") == "sft"
    assert nodes["half"].inputs["model.0"] == "linear"


def test_what_is_said_is_against_the_sft_model_of_the_seed(tmp_path, monkeypatch):
    import averaging  # pyright: ignore[reportMissingImports]

    def model(exact, kl):
        return {averaging.EXACT: exact, averaging.DRAWN: exact - 0.1, averaging.KL: kl}

    found = []
    for before in (0.4, 0.6):
        gains = {"sft": 0.0, "dpo": 0.02, "order": 0.03, "strength": 0.04, "linear": 0.05}
        models = {name: model(before + gains.get(name, 0.01), 2.0) for name in averaging.TITLES}
        found.append({"models": models | {"half": model(before, 0.8), "sft": model(before, 0.0)}, "angle": 14.0})
    result = {"seeds": [0, 1], **averaging.summarise(found)}
    assert [claim["value"] for claim in result["claims"]] == pytest.approx([0.02, 0.4])
    assert all(claim["holds"] for claim in result["claims"])
    lines = averaging.table(result)
    assert lines[3] == "| DPO | 0.520 ± 0.141 | 0.420 ± 0.141 | 2.000 ± 0.000 | +0.020 +0.020 |"
    monkeypatch.setattr(averaging, "PICTURE", tmp_path / "averaging.svg")
    averaging.draw(result)
    for title in averaging.TITLES.values():
        assert averaging.PICTURE.read_text().count(f"<!-- {title.replace('`', '')} -->")


def test_the_page_has_the_figures_of_the_result():
    import averaging  # pyright: ignore[reportMissingImports]
    import claims  # pyright: ignore[reportMissingImports]
    import trials  # pyright: ignore[reportMissingImports]

    result = trials.read(claims.RESULTS / "averaging.json")
    page = Path(__file__).parents[2] / "docs" / "methods" / "averaging.md"
    assert "\n".join(averaging.table(result)) in page.read_text("utf-8")
    assert len(result["seeds"]) == 3
