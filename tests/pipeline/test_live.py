"""Stages that learn from their own policy's responses in a recipe: their nodes, their size, a real run, mistakes."""

from __future__ import annotations

import json

import pytest

from lightning_llm import compose, plan, run
from lightning_llm.data.experience import Experience
from lightning_llm.pipeline.scaling import scaled
from lightning_llm.report import report
from lightning_llm.report.charts import live_curves
from lightning_llm.report.record import read_run
from lightning_llm.settings import UserError

ONLINE = [
    "+stage@stages.online=online_dpo",
    "stages.online.starts_from=dpo",
    "judge@stages.online.judge=exact_answer",
    "stages.online.examples=60_000",
    "stages.online.context=32_768",
    "stages.online.lr.peak=5e-7",
]
REWARDS = [
    "+stage@stages.reward_model=reward_model",
    "stages.reward_model.starts_from=sft",
    "stages.reward_model.examples=300",
    "stages.reward_model.context=1024",
    "stages.reward_model.batch_tokens=1024",
    "stages.reward_model.lr.peak=3e-5",
    "stages.reward_model.evaluate=false",
]


def test_a_live_stage_has_prompts_and_judges_and_no_reference():
    words = [*ONLINE, *REWARDS, "judge@stages.online.judge=reward_model", "stages.online.judged_by=[reward_model]"]
    nodes = {node.name: node for node in plan(compose("qwen2", overrides=words)).nodes}
    assert "online.reference" not in nodes
    assert "dpo.reference" in nodes
    assert nodes["online"].inputs["reward_model.0"] == "reward_model"
    assert nodes["online.prepare"].settings.data.form == "prompts"
    assert nodes["online.evaluate"].settings.preference_mode == "implicit_reward"
    names = list(nodes)
    assert names.index("reward_model") < names.index("online")


def test_examples_are_prompts_and_every_pass_over_what_they_made_costs_steps():
    sizes = ("context=1024", "lr.peak=1e-6", "rollout.prompts=50", "examples=5000")
    words = [*ONLINE[:3], "+stage@stages.rlhf=rlhf", "stages.rlhf.starts_from=dpo"]
    words += ["judge@stages.rlhf.judge=exact_answer", "stages.rlhf.rollout.max_new_tokens=9"]
    words += [f"stages.{name}.{size}" for name in ("online", "rlhf") for size in sizes]
    words += ["stages.rlhf.rollout.epochs=3"]
    planned = plan(compose("qwen2", overrides=words))
    figures = {node.name: node.figures for node in planned.nodes}
    assert figures["online"]["steps"] == 100
    assert figures["rlhf"]["steps"] == 300
    assert planned.recipe.stages["rlhf"].rollout.max_new_tokens == 9  # the user's
    assert planned.recipe.stages["online"].rollout.max_new_tokens == planned.recipe.scale.generation.max_new_tokens
    assert figures["online"]["seconds"] > 0
    assert figures["online"]["flops"] > figures["dpo"]["flops"]


def test_a_scale_says_how_many_prompts_a_step_has():
    published = compose("qwen2", scale="paper", overrides=ONLINE)
    assert scaled(published).stages["online"].rollout.prompts == 128
    small = scaled(compose("qwen2", scale="small", overrides=ONLINE[:3] + ONLINE[4:] + ["stages.online.examples=1000"]))
    assert small.stages["online"].rollout.prompts == small.scale.phases["online"].prompts
    assert small.stages["online"].batch_tokens == 64 * small.scale.phases["online"].tokens_per_example


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["judge@stages.online.judge=reward_model"], "stages.online.judged_by: names nobody, and the judge asks"),
        (["stages.online.judge=null"], "stages.online.judge: has no value"),
        (["stages.online.rollout.per_prompt=1"], "stages.online.rollout.per_prompt: is at least 2"),
        (["stages.online.starts_from=null"], "stages.online.starts_from: has no value: random weights"),
        (["stages.online.batch_tokens=1000"], "stages.online.batch_tokens: is given, .*rollout.prompts instead"),
        (["stages.online.context=[{at: 0, value: 64}, {at: 100, value: 128}]"], "stages.online.context: is a ramp"),
        (["objective@stages.online.objective=causal_lm"], "stages.online.objective: causal_lm does not learn from"),
        (["data@stages.online.data=qwen2_preferences"], "stages.online.data: qwen2_preferences holds pairs"),
        (["stages.online.rollout=null", "stages.online.batch_tokens=9"], "stages.online.judge: is given, and nothing"),
        (["stages.online.rollout.epochs=9"], "stages.online.rollout: max_staleness is 7"),
        (["stages.online.rollout.prompt=9"], "stages.online.rollout.prompt"),
        (["stages.online.judged_by=[sft]"], "stages.online.judged_by: sft is a model that speaks"),
        (["objective@stages.sft.objective=mdpo"], "stages.sft.objective: mdpo learns from what the policy samples"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(words, says):
    with pytest.raises(UserError, match=says):
        compose("qwen2", overrides=[*ONLINE, *words])


def test_every_objective_that_learns_from_samples_composes():
    for name in ("dpo", "ipo", "mdpo", "rloo", "ppo", "grpo", "dapo"):
        recipe = compose("qwen2", overrides=[*ONLINE, f"objective@stages.online.objective={name}"])
        assert recipe.stages["online"].objective.name == name


def test_a_run_with_a_reward_model(beside, tmp_path):
    """sft -> reward_model, and online DPO from dpo with its scores: the run of the other tests goes on."""
    words = [
        *beside(tmp_path),
        *ONLINE,
        *REWARDS,
        "judge@stages.online.judge=reward_model",
        "stages.online.judged_by=[reward_model]",
    ]
    words += ["stages.online.examples=24", "stages.online.rollout.prompts=8", "stages.online.rollout.held_out=6"]
    words += ["stages.online.context=1024"]
    words += ["stages.online.rollout.max_new_tokens=12", "scale.corpora.comparisons.options={rows: 400}"]
    done = run(compose("qwen2", overrides=words), until="online")
    assert done.stages["sft"]["reused"]
    folder = done.artifact("online")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert training[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is its reference yet
    assert len(list((folder / "experience").iterdir())) == 3
    for line, path in zip(training, sorted((folder / "experience").iterdir()), strict=True):
        rewards = [response.reward for group in Experience.load(path).groups for response in group.responses]
        assert line["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
    drawn = live_curves([read_run(done.folder)])
    assert drawn is not None
    assert drawn["data"][0]["y"] == pytest.approx([line["reward/mean"] for line in training], abs=1e-4)
    assert "own responses" in report([done.folder], folder.parent / "page.html").read_text()
    metrics = done.stages["online"]["metrics"]
    assert {"validation/reward/mean", "reward/mean", "kl/reference", "tasks/exact_match"} <= set(metrics)
