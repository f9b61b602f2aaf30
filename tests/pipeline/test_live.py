"""Stages that learn from their own policy's responses in a recipe: their nodes, their size, a real run, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_llm import compose, plan, run
from lightning_llm.batch import SegmentBatch
from lightning_llm.data.experience import Experience
from lightning_llm.models.reward import RewardModel
from lightning_llm.pipeline.scaling import scaled
from lightning_llm.report import report
from lightning_llm.report.charts import live_curves
from lightning_llm.report.record import read_run
from lightning_llm.settings import UserError


def test_a_live_stage_has_prompts_and_judges_and_no_reference():
    nodes = {node.name: node for node in plan(compose("qwen2")).nodes}
    assert "online_dpo.reference" not in nodes
    assert "dpo.reference" in nodes
    inputs = nodes["online_dpo"].inputs
    assert (inputs["starts_from"], inputs["reward_model.0"]) == ("dpo", "reward_model")
    assert (inputs["merging_base"], inputs["merging_reference"]) == ("long_context", "sft")
    assert nodes["online_dpo.prepare"].settings.data.form == "prompts"
    assert nodes["online_dpo.evaluate"].settings.preference_mode == "implicit_reward"
    names = list(nodes)
    assert names.index("reward_model") < names.index("online_dpo")


def test_examples_are_prompts_and_every_pass_over_what_they_made_costs_steps():
    sizes = ("context=1024", "lr.peak=1e-6", "rollout.prompts=50", "examples=5000")
    words = ["+stage@stages.rlhf=rlhf", "stages.rlhf.starts_from=dpo"]
    words += ["judge@stages.rlhf.judge=exact_answer", "stages.rlhf.rollout.max_new_tokens=9"]
    words += [f"stages.{name}.{size}" for name in ("online_dpo", "rlhf") for size in sizes]
    words += ["stages.rlhf.rollout.epochs=3"]
    planned = plan(compose("qwen2", overrides=words))
    figures = {node.name: node.figures for node in planned.nodes}
    assert figures["online_dpo"]["steps"] == 100
    assert figures["rlhf"]["steps"] == 300
    assert planned.recipe.stages["rlhf"].rollout.max_new_tokens == 9  # the user's
    assert planned.recipe.stages["online_dpo"].rollout.max_new_tokens == planned.recipe.scale.generation.max_new_tokens
    assert figures["online_dpo"]["seconds"] > 0
    assert figures["online_dpo"]["flops"] > figures["dpo"]["flops"]


def test_the_plan_says_that_a_policy_gradient_is_not_exact_where_others_are_drawn():
    cold = "rollout.sampling.temperature=0.9"
    said = plan(compose("policy_gradients", overrides=[f"stages.rlhf.{cold}"])).notes
    assert [line.partition(":")[0] for line in said] == ["rlhf"]
    assert "rollout.sampling" in said[0]
    assert plan(compose("qwen2", overrides=[f"stages.online_dpo.{cold}"])).notes == ()  # pairs may come from anywhere


def test_a_scale_says_how_many_prompts_a_step_has():
    published = compose("qwen2", scale="paper")
    assert scaled(published).stages["online_dpo"].rollout.prompts == 128
    small = scaled(compose("qwen2", scale="small", overrides=["stages.online_dpo.examples=1000"]))
    assert small.stages["online_dpo"].rollout.prompts == small.scale.phases["online"].prompts
    assert small.stages["online_dpo"].batch_tokens == 64 * small.scale.phases["online"].tokens_per_example


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stages.online_dpo.judged_by=[]"], "stages.online_dpo.judged_by: names nobody, and the judge asks"),
        (["stages.online_dpo.judge=null"], "stages.online_dpo.judge: has no value"),
        (["stages.online_dpo.starts_from=null"], "stages.online_dpo.starts_from: has no value: random weights"),
        (
            ["stages.online_dpo.batch_tokens=1000"],
            "stages.online_dpo.batch_tokens: is given, .*rollout.prompts instead",
        ),
        (
            ["stages.online_dpo.context=[{at: 0, value: 64}, {at: 100, value: 128}]"],
            "stages.online_dpo.context: is a ramp",
        ),
        (
            ["objective@stages.online_dpo.objective=causal_lm"],
            "stages.online_dpo.objective: causal_lm does not learn from",
        ),
        (["data@stages.online_dpo.data=qwen2_preferences"], "stages.online_dpo.data: qwen2_preferences holds pairs"),
        (
            ["stages.online_dpo.rollout=null", "stages.online_dpo.batch_tokens=9"],
            "stages.online_dpo.judge: is given, and nothing",
        ),
        (["stages.online_dpo.rollout.per_prompt=1"], "stages.online_dpo.rollout.per_prompt: is at least 2"),
        (["stages.online_dpo.rollout.epochs=9"], "stages.online_dpo.rollout.max_staleness: is 7"),
        (["stages.online_dpo.rollout.prompt=9"], "stages.online_dpo.rollout.prompt"),
        (["stages.online_dpo.judged_by=[sft]"], "stages.online_dpo.judged_by: sft is a language model"),
        (["objective@stages.sft.objective=mdpo"], "stages.sft.objective: mdpo learns from what the policy samples"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(words, says):
    with pytest.raises(UserError, match=says):
        compose("qwen2", overrides=words)


def test_every_objective_that_learns_from_samples_composes():
    for name in ("dpo", "ipo", "mdpo", "rloo", "ppo", "grpo", "dapo"):
        recipe = compose("qwen2", overrides=[f"objective@stages.online_dpo.objective={name}"])
        assert recipe.stages["online_dpo"].objective.name == name


def test_qwen2s_last_stage_learns_from_what_its_reward_model_says(run_folder, tmp_path):
    made = read_run(run_folder)
    folder = run_folder / "artifacts" / "online_dpo"
    training = [line for line in metric_lines(folder) if "loss" in line]
    assert training[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is its reference yet
    records = [Experience.load(path) for path in sorted((folder / "experience").iterdir())]
    assert len(records) == 3
    # a step of which no prompt makes a pair writes no line: the next one speaks of both
    for line, begin in zip(training, [0, *(line["step"] for line in training)], strict=False):
        groups = [group for record in records[begin : line["step"]] for group in record.groups]
        rewards = [response.reward for group in groups for response in group.responses]
        assert line["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
    [group, *_] = records[0].groups
    model = RewardModel.from_pretrained(run_folder / "artifacts" / "reward_model" / "model")
    with torch.no_grad():
        said = SegmentBatch.from_documents([group.prompt_ids + response.ids for response in group.responses])
        scores = model.scores(said)
    assert [response.reward for response in group.responses] == pytest.approx(scores.tolist(), abs=1e-4)
    drawn = live_curves([made])
    assert drawn is not None
    assert drawn["data"][0]["y"] == pytest.approx([line["reward/mean"] for line in training], abs=1e-4)
    assert "own responses" in report([run_folder], tmp_path / "page.html").read_text()
    metrics = json.loads((run_folder / "run.json").read_text())["stages"]["online_dpo"]["metrics"]
    assert {"validation/reward/mean", "reward/mean", "kl/reference", "tasks/exact_match"} <= set(metrics)


def test_a_killed_stage_ends_as_if_nothing_had_happened(beside, tmp_path, capfd):
    """Half-way a process of its own is killed; whoever goes on makes the weights of a run that was not, to the bit."""
    more = ["stages.online_dpo.examples=160", "stages.online_dpo.rollout.steps=2", "stages.online_dpo.rollout.epochs=2"]
    more += ["stages.online_dpo.rollout.reference=ema", "stages.online_dpo.rollout.ema_decay=0.9"]
    words = {name: [*beside(tmp_path / name), *more] for name in ("killed", "whole")}
    program = [sys.executable, "-m", "lightning_llm.cli", "run", "recipe=qwen2", *words["killed"]]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    started = subprocess.Popen(program, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    making = tmp_path / "killed" / "artifacts" / ".making"
    while not list(making.glob("train-online_dpo-*/experience/000003")) and started.poll() is None:
        time.sleep(0.01)
    started.kill()
    assert started.wait() == -signal.SIGKILL
    [left] = making.glob("train-online_dpo-*")
    drawn = {path.relative_to(left): path.stat().st_mtime_ns for path in left.glob("experience/??????/*")}
    assert 12 <= len(drawn) < 30  # of ten records of three files
    capfd.readouterr()
    ends = {}
    for name, own in words.items():
        ends[name] = run(compose("qwen2", overrides=own)).artifact("online_dpo")
        said = "drawings of an interrupted run are there" in capfd.readouterr().err
        assert said == (name == "killed")
    for path, time_of_change in drawn.items():
        assert (ends["killed"] / path).stat().st_mtime_ns == time_of_change
    files = [sorted(path.relative_to(end) for path in end.rglob("*") if path.is_file()) for end in ends.values()]
    assert files[0] == files[1]
    for path in files[0]:
        if path.suffix == ".safetensors" or path.parts[0] == "experience":
            assert (ends["killed"] / path).read_bytes() == (ends["whole"] / path).read_bytes(), path
    measured = ("tokens_per_second", "flops_utilisation")
    for one, other in zip(*(metric_lines(end) for end in ends.values()), strict=True):
        assert {k: v for k, v in one.items() if k not in measured} == {
            k: v for k, v in other.items() if k not in measured
        }


def metric_lines(artifact):
    return [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
