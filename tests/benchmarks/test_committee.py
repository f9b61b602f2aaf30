"""A committee and one model ask as many responses; what is said of both is against the SFT model of the same seed."""

from pathlib import Path

import pytest

from lightning_llm import compose, plan
from lightning_llm.pipeline.order import ancestors
from lightning_llm.stages.config import GenerateStage, TrainStage

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_both_arms_draw_equally_many_responses_to_the_same_prompts():
    import committee  # pyright: ignore[reportMissingImports]

    drawn = set()
    for arm in committee.ARMS:
        stages = plan(compose("itec", overrides=committee.words(arm))).recipe.stages
        needed = ancestors("itec2.distilled", stages)  # what the compared model has learnt from
        count = 0
        for name in needed:
            stage = stages[name]
            if isinstance(stage, GenerateStage):
                count += stage.prompts * stage.per_prompt * len(stage.models)
                assert tuple(stage.data.sources) == ("questions",)
            elif isinstance(stage, TrainStage) and stage.rollout is not None:
                count += stage.examples * stage.rollout.per_prompt
        assert not needed & {"dpo", "rlhf"}  # nothing is learnt from an answer that no model has given
        drawn.add(count)
    assert drawn == {1024 * (24 + 8 + 24)}


def test_changes_are_against_the_sft_model_of_the_seed(tmp_path, monkeypatch):
    import committee  # pyright: ignore[reportMissingImports]

    def figures(exact):
        return {committee.EXACT: exact, committee.DRAWN: exact - 0.1}

    winner = {"score": 0.5, "best_or_tied": 0.9, "right_alone": 0.1, "kept": 700}
    found = {}
    for arm, gain in ((committee.COMMITTEE, 0.1), (committee.ALONE, 0.04)):
        rounds = [[figures(before + gain * turn) for turn in range(committee.ROUNDS + 1)] for before in (0.4, 0.6)]
        found[arm] = [
            {
                "members": dict.fromkeys(committee.members(arm), of_seed),
                "tables": [{"models": {f"itec{turn}.distilled": winner}} for turn in range(committee.ROUNDS)],
            }
            for of_seed in rounds
        ]
    result = {"seeds": [0, 1], **committee.summarise(found)}
    assert [each["value"] for each in result["claims"]] == [0.2, 0.12]
    assert committee.table(result)[2].startswith("| committee of three | distilled | 0.500 ± 0.141 | 0.600 ± 0.141")
    assert committee.table_of_winners(result)[2] == "| 0 | itec1.distilled | 0.500 | 90.0% | 10.0% | 700 |"
    monkeypatch.setattr(committee, "PICTURE", tmp_path / "committee.svg")
    committee.draw(result)
    assert committee.PICTURE.read_text().count("one model: distilled") == 1


def test_the_page_has_the_figures_of_the_result():
    import claims  # pyright: ignore[reportMissingImports]
    import committee  # pyright: ignore[reportMissingImports]
    import trials  # pyright: ignore[reportMissingImports]

    result = trials.read(claims.RESULTS / "committee.json")
    page = (Path(__file__).parents[2] / "docs" / "methods" / "rejection_sampling.md").read_text("utf-8")
    assert "\n".join(committee.table(result)) in page
    assert "\n".join(committee.table_of_winners(result)) in page
    assert len(result["seeds"]) == 3
