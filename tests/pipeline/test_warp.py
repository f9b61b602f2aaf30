"""WARP as a recipe: its loop of policies and merges, the figures of the paper, and a small run of it."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load_file

from lightning_llm import compose, plan, run
from lightning_llm.merging.averaging import liti
from lightning_llm.merging.spherical import slerp_task_vectors

POLICIES = [f"warp{n}.{name}" for n in (1, 2, 3) for name in ("one", "two")]


@functools.cache
def nodes_of(*words, scale="nano"):
    return {node.name: node for node in plan(compose("warp", scale, words)).nodes}


def test_it_is_the_algorithm_of_the_paper():
    nodes = nodes_of("compute=ddp", scale="paper")
    for n, start in enumerate(["sft", "warp1.init", "warp2.init"], start=1):
        assert [nodes[f"warp{n}.{name}"].inputs["starts_from"] for name in ("one", "two")] == [start] * 2
        policies = {"model.0": f"warp{n}.one", "model.1": f"warp{n}.two", "starts_from": start}
        assert nodes[f"warp{n}.merged"].inputs == policies
        assert nodes[f"warp{n}.merged"].settings.method.name == "slerp"
        assert nodes[f"warp{n}.init"].inputs == {"model.0": f"warp{n}.merged", "starts_from": start}
        assert nodes[f"warp{n}.init"].settings.method.eta == 0.3
    assert nodes["front"].inputs == {"model.0": "warp3.merged", "starts_from": "sft"}
    assert [nodes[name].figures["steps"] for name in POLICIES] == [9000, 9000, 7000, 7000, 7000, 7000]
    assert [nodes[name].settings.seed for name in POLICIES] == list(range(6))  # no two see the prompts in one order
    for name in POLICIES:
        settings = nodes[name].settings
        rollout = settings.rollout
        assert (settings.objective.name, settings.objective.beta, settings.lr.peak) == ("rloo", 0.1, 1e-6)
        assert (rollout.reference, rollout.ema_decay, rollout.sampling.temperature) == ("ema", 0.99, 0.9)
        assert rollout.per_prompt * 32 == 128


def test_fewer_rounds_and_another_point_of_the_front_leave_the_policies_alone():
    nodes, fewer = nodes_of(), nodes_of("stages.warp.rounds=1", "stages.front.method.eta=0.8")
    assert fewer["front"].inputs == {"model.0": "warp1.merged", "starts_from": "sft"}
    assert fewer["front"].settings.method.eta == 0.8
    for name in ("sft", "warp1.one", "warp1.two", "warp1.merged"):
        assert fewer[name].settings == nodes[name].settings


@pytest.mark.slow
def test_a_small_run(beside, tmp_path):
    kept = [word for word in beside(tmp_path) if not word.startswith(("stages.reward_model.", "stages.online_dpo."))]
    words = [*kept, "stages.warp.rounds=2", "+stages.warp.by_round.one.examples=[16,16]"]
    words += ["+stages.warp.by_round.two.examples=[16,16]", "scale.phases.rlhf.prompts=8"]
    words += [f"stages.warp.stages.{name}.rollout.held_out=4" for name in ("one", "two")]
    # so small a model is never right, and would learn nothing
    words += [f"judge@stages.warp.stages.{name}.judge=random" for name in ("one", "two")]
    words += [f"stages.warp.stages.{name}.evaluate=false" for name in ("one", "two", "merged")]
    record = run(compose("warp", overrides=words), until="front")
    assert record.stages["sft"]["reused"]

    def weights(name, folder="model"):
        return load_file(record.artifact(name) / folder / "model.safetensors")

    start = weights("sft")
    for n, is_last in ((1, False), (2, True)):
        one, two = weights(f"warp{n}.one"), weights(f"warp{n}.two")
        assert any(not torch.equal(one[name], two[name]) for name in one)
        anchor = weights(f"warp{n}.one", "reference")  # between where the policy began and where it is
        assert any(not torch.equal(anchor[name], start[name]) for name in one)
        merged = slerp_task_vectors(start, [one, two])
        for name, tensor in weights(f"warp{n}.merged").items():
            torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-7)
        if not is_last:
            init, start = liti(start, merged, 0.3), weights(f"warp{n}.init")
            for name, tensor in start.items():
                torch.testing.assert_close(tensor, init[name], rtol=1e-5, atol=1e-7)
    front = liti(weights("sft"), weights("warp2.merged"), 0.5)
    for name, tensor in weights("front").items():
        torch.testing.assert_close(tensor, front[name], rtol=1e-5, atol=1e-7)
    assert "tasks/exact_match" in record.stages["front"]["metrics"]
