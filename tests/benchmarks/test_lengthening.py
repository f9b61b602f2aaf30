"""Contexts that grow in steps: what claims take from the stages of runs, also where a gate has stopped one."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


def stage(context, web, code, *, gain=None, rise=None, needles=None):
    found = {
        "context": context,
        "tokens": 1000,
        "seconds": 2.0,
        "metrics": {"perplexity/web": web, "perplexity/code": code},
    }
    if gain is not None:
        found["metrics"] |= {"late_loss/gain": gain}
    if rise is not None:
        found["short_context"] = rise
    if needles is not None:
        grid = {"lengths": [128, 256], "depths": [0.0, 1.0], "trials": 10, "answer": "likelihood", "chance": 0.1}
        found["needles"] = grid | {"found": needles}
        found["metrics"] |= {"needle/128": sum(needles[0]) / 2, "needle/256": sum(needles[1]) / 2}
    return found


def stages(*rises, gain=0.02):
    steps = {
        f"lengthen{place}.step": stage(128 << place, 60, 50, gain=gain, rise=rise, needles=[[0.1, 0.2], [0.0, 0.4]])
        for place, rise in enumerate(rises, start=1)
    }
    return {"pretrain": stage(128, 60, 50), **steps}


def test_claims_are_judged_on_the_worst_step_and_seed():
    import lengthening  # pyright: ignore[reportMissingImports]

    both = {0: stages(0.01, 0.03, gain=0.01), 1: stages(-0.01, 0.02, gain=-0.002)}
    for found in both.values():
        found["anneal"] = stage(512, 50, 40, rise=-0.2)
    found = lengthening.summarise(both, 0.05)
    short, late = found["claims"]
    assert (short["value"], short["worst"], short["holds"]) == (0.03, "lengthen2.step, seed 0", True)
    assert (late["value"], late["holds"]) == (-0.002, False)
    assert "with 128 tokens" in late["claim"]
    assert found["reached"] == {"0": "anneal", "1": "anneal"}
    assert found["needles"]["after"] == "lengthen2.step"


def test_a_seed_that_was_stopped_fails_both_claims():
    import lengthening  # pyright: ignore[reportMissingImports]

    whole = stages(0.01, 0.02) | {"anneal": stage(512, 50, 40, rise=-0.2)}
    found = lengthening.summarise({0: whole, 1: stages(0.03)}, 0.05)
    assert [claim["holds"] for claim in found["claims"]] == [False, False]
    assert [claim["stopped"] for claim in found["claims"]] == [[1], [1]]
    assert [claim["value"] for claim in found["claims"]] == [0.03, 0.02]
    assert found["claims"][0]["worst"] == "lengthen1.step, seed 1"
    assert found["reached"] == {"0": "anneal", "1": "lengthen1.step"}
    assert found["stages"]["lengthen1.step"]["short_context"]["values"] == [0.01, 0.03]
    rows = lengthening.table(found)
    assert "| lengthen2.step (1 of 2 seeds) | 512 | 60.0 | 50.0 | +2.0% | +0.020 | 18% | 2 |" in rows


def test_without_a_document_as_long_as_the_context_there_is_no_figure():
    import lengthening  # pyright: ignore[reportMissingImports]

    whole = stages(0.01, gain=None) | {"anneal": stage(256, 50, 40, rise=-0.2)}
    short, late = lengthening.summarise({0: whole}, 0.05)["claims"]
    assert short["holds"]
    assert (late["value"], late["values"], late["holds"]) == (None, [], False)


def test_maps_of_seeds_are_averaged_cell_by_cell():
    import lengthening  # pyright: ignore[reportMissingImports]

    one, other = ({"lengths": [8], "depths": [0, 1], "trials": 10, "answer": "likelihood", "chance": 0.1} for _ in "ab")
    found = lengthening.mean_map([one | {"found": [[0.0, 1.0]]}, other | {"found": [[0.5, 0.0]]}])
    assert found["found"] == [[0.25, 0.5]]
    assert found["trials"] == 20


def test_a_run_that_its_gate_has_stopped_says_so(tmp_path):
    import lengthening  # pyright: ignore[reportMissingImports]

    for status, stopped in (("stopped", True), ("failed", False), ("done", False)):
        (tmp_path / "run.json").write_text(json.dumps({"status": status, "stages": {}}))
        assert lengthening.was_stopped([tmp_path]) is stopped
    assert not lengthening.was_stopped([])


def test_the_picture_shows_changes_and_needles(tmp_path, monkeypatch):
    import lengthening  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(lengthening, "PICTURE", tmp_path / "picture.svg")
    lengthening.draw(lengthening.summarise({0: stages(0.01, 0.02), 1: stages(0.03, 0.02)}, 0.05))
    drawn = lengthening.PICTURE.read_text()
    for text in ("the gate: 5%", "needles found after lengthen2.step; by chance 0.1", "40%"):
        assert f"<!-- {text} -->" in drawn
    assert lengthening.gate() == 0.05


def test_every_step_is_compared_with_the_stage_before_the_first(tmp_path):
    import lengthening  # pyright: ignore[reportMissingImports]

    perplexities = {"pretrain": 50.0, "lengthen1.step": 52.0, "lengthen2.step": 54.0}
    for name, perplexity in perplexities.items():
        for node, content in ((name, {"tokens": 8}), (f"{name}.evaluate", {"full_context": 128})):
            folder = tmp_path / "artifacts" / node
            folder.mkdir(parents=True)
            (folder / "stage.json").write_text(json.dumps({"settings": content, "seconds": {"total": 1.0}}))
        (folder / "metrics.json").write_text(json.dumps({"perplexity/web": perplexity}))
    made = {node: {} for name in perplexities for node in (name, f"{name}.evaluate")}
    (tmp_path / "run.json").write_text(json.dumps({"stages": made}))
    rises = [found.get("short_context") for found in lengthening.read_stages(tmp_path).values()]
    assert rises == [None, pytest.approx(0.04), pytest.approx(0.08)]


def test_the_page_has_the_figures_of_the_result(benchmarks):
    import claims  # pyright: ignore[reportMissingImports]
    import lengthening  # pyright: ignore[reportMissingImports]
    import trials  # pyright: ignore[reportMissingImports]

    result = trials.read(claims.RESULTS / "lengthening.json")
    page = Path(__file__).parents[2] / "docs" / "methods" / "context_lengthening.md"
    assert "\n".join(lengthening.table(result)) in page.read_text("utf-8")
    assert set(result["reached"].values()) == {lengthening.LAST}
