"""A repeated part of a recipe: where edges lead in every round, what is set in all of them, and mistakes."""

from __future__ import annotations

import pytest

from lightning_llm import compose, plan
from lightning_llm.pipeline.rounds import stages_of_rounds, typed_key, unrolled
from lightning_llm.settings import UserError
from lightning_llm.stages.config import GenerateStage, RoundsStage, SelectStage, TrainStage
from lightning_llm.training.config import RolloutConfig

RECIPE = """# @package _global_
defaults:
  - /model: qwen2_0_5b
  - /stage@stages.sft: sft
  - /stage@stages.post: rounds
  - /stage@stages.post.stages.sample: sample
  - /stage@stages.post.stages.best: select
  - /stage@stages.post.stages.rs: sft
  - /stage@stages.last: sft
  - _self_
stages:
  sft: {examples: 1000, context: 128, batch_tokens: 1e3, lr: {peak: 1e-4}}
  post:
    rounds: 3
    begins_with: {rs: sft}
    stages:
      sample: {models: [sft, previous_round.rs], per_prompt: 4}
      best: {data: [sample, previous_round.sample], rule: first, keep: 0.5}
      rs:
        starts_from: previous_round.rs
        examples: 1000
        context: 128
        batch_tokens: 1e3
        lr: {peak: 1e-5}
        data: {sources: {best: {path: "stage:best", weight: 1.7}}}
  last:
    starts_from: post.rs
    examples: 1000
    context: 128
    batch_tokens: 1e3
    lr: {peak: 1e-5}
    data: {sources: {best: {path: "stage:post.best"}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "recipe").mkdir()
    (folder / "recipe" / "repeated.yaml").write_text(RECIPE.replace("[sft, previous_round.rs]", "[previous_round.rs]"))
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    return compose("repeated", overrides=["scale.minimum_steps=1"], config_dir=folder)


def test_edges_lead_to_the_round_before(recipe):
    stages = recipe.stages
    assert list(stages) == ["sft", *(f"post{n}.{own}" for n in (1, 2, 3) for own in ("sample", "best", "rs")), "last"]
    assert [stages[f"post{n}.rs"].starts_from for n in (1, 2, 3)] == ["sft", "post1.rs", "post2.rs"]
    assert [stages[f"post{n}.sample"].models for n in (1, 2, 3)] == [["sft"], ["post1.rs"], ["post2.rs"]]
    assert [stages[f"post{n}.sample"].round for n in (1, 2, 3)] == [0, 1, 2]
    assert stages["post1.best"].data == ["post1.sample"]  # there is no round before the first: the list goes without
    assert stages["post3.best"].data == ["post3.sample", "post2.sample"]
    assert stages["post2.rs"].data.sources["best"].path == "stage:post2.best"
    assert stages["last"].starts_from == "post3.rs"
    assert stages["last"].data.sources["best"].path == "stage:post3.best"


def test_a_live_stage_asks_other_prompts_in_each_round():
    live = TrainStage(starts_from="previous_round.rl", rollout=RolloutConfig(round=1))
    rounds = RoundsStage(rounds=3, stages={"rl": live}, begins_with={"rl": "sft"})
    flat = unrolled({"sft": TrainStage(), "post": rounds})
    assert [flat[f"post{n}.rl"].rollout.round for n in (1, 2, 3)] == [1, 2, 3]


def test_the_plan_has_the_nodes_of_all_rounds(recipe):
    nodes = {node.name: node for node in plan(recipe).nodes}
    assert nodes["post2.rs"].inputs == {
        "starts_from": "post1.rs", "data": "post2.rs.prepare", "tokenizer": "tokenizer"
    }  # fmt: skip
    assert nodes["post2.rs.prepare"].inputs == {"tokenizer": "tokenizer", "source.best": "post2.best"}
    assert nodes["post2.best"].inputs == {"samples.0.0": "post2.sample", "samples.1.0": "post1.sample"}
    assert nodes["post2.rs.evaluate"].stage == "post2.rs"
    chosen = {node.stage for node in plan(recipe).selected(until="post1.rs").nodes}
    assert chosen == {"tokenizer", "evaluation", "sft", "post1.sample", "post1.best", "post1.rs"}
    prompts = plan(recipe).recipe.stages["post1.sample"].prompts
    # one pass over the half that is kept; it is 1.7 of 2.7 of the tokens, the rest are the option's own sources
    assert plan(recipe).recipe.stages["post1.rs"].examples == pytest.approx(prompts / 2 * 2.7 / 1.7)


def test_what_the_user_sets_in_a_round_is_set_in_all(folder):
    words = ["stages.post.rounds=2", "stages.post.stages.rs.lr.peak=0.25", "stages.post.stages.sample.prompts=77"]
    recipe = compose("repeated", overrides=[*words, "stages.post.stages.rs.tokens=5e3"], config_dir=folder)
    scaled = plan(recipe).recipe.stages
    assert "post3.rs" not in scaled
    for n in (1, 2):
        assert (scaled[f"post{n}.rs"].lr.peak, scaled[f"post{n}.rs"].tokens) == (0.25, 5e3)
        assert (scaled[f"post{n}.sample"].prompts, scaled[f"post{n}.rs"].examples) == (77, None)
        assert recipe.published[f"stages.post{n}.rs.lr.peak"] == 1e-5


MISTAKES = {
    "stages.post.stages.rs.starts_from=previous_round.sr": ["stages.post.stages.rs.starts_from", "sr", "rs"],
    "~stages.post.begins_with.rs": [
        "stages.post.stages.sample.models",
        "the first has none",
        "begins_with={rs: STAGE}",
    ],
    "stages.post.stages.rs.context=-1": ["stages.post.stages.rs.context: is -1"],
    "stages.post.stages.best.rule=bets": ["stages.post.stages.best.rule", "The nearest is best"],
    "stages.post.rounds=0": ["stages.post.rounds"],
    "+stage@stages.post.stages.more=rounds": ["stages.post.stages.more", "inside rounds"],
    "stages.post.stages.sample.prompst=3": ["prompst", "The nearest is prompts"],
    "stages.last.starts_from=post.sample": [
        "stages.last.starts_from",
        "is a stage of kind generate",
        "train or merge or prune or upcycle is wanted",
    ],
    "stages.last.data.sources.best.path=stage:bets": ["stages.last.data.sources.best.path: bets is no stage", "best"],
    "stages.post.stages.sample.models=[previous_round.rs,rs]": ["goes round in a circle"],
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake(typed, folder):
    with pytest.raises(UserError) as caught:
        compose("repeated", overrides=[typed], config_dir=folder)
    assert "\n" not in str(caught.value)
    for part in MISTAKES[typed]:
        assert part in str(caught.value)


def test_one_round_is_the_stages_as_they_are():
    inside = {"a": GenerateStage(models=["sft"]), "b": SelectStage(data=["a"]), "c": TrainStage(starts_from="sft")}
    flat = unrolled({"sft": TrainStage(), "post": RoundsStage(rounds=1, stages=inside)})
    assert flat["post1.a"] == inside["a"]
    assert flat["post1.b"] == SelectStage(data=["post1.a"])
    assert flat["post1.c"] == inside["c"]


def test_keys_are_named_as_they_are_typed():
    rounds = stages_of_rounds({"post": RoundsStage(stages={"sft": TrainStage()}), "post2": TrainStage()})
    assert rounds == {"post": ("sft",)}
    assert typed_key("stages.post2.sft.lr.peak", rounds) == "stages.post.stages.sft.lr.peak"
    assert typed_key("stages.post2.lr.peak", rounds) == "stages.post2.lr.peak"
