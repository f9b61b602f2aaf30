"""Pruning in a recipe: edges, sizes at every scale, keys, plan, mistakes, and a real run by the command line."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_llm import cli, compose, plan
from lightning_llm.models import Transformer
from lightning_llm.models.families import read_config
from lightning_llm.models.masked import MASKS_FILE, MaskedTransformer, read_scores
from lightning_llm.models.size import parameter_counts
from lightning_llm.pipeline.key import node_keys
from lightning_llm.pipeline.remade import units_of_masks
from lightning_llm.settings import UserError

BY_FLOW = ["prune@stages.prune.method=activation"]
BY_SIZE = ["prune@stages.prune.method=magnitude"]


@functools.cache
def nodes_of(*words, recipe="pruning", scale="nano"):
    return {node.name: node for node in plan(compose(recipe, scale, overrides=words)).nodes}


def test_afm_on_device_is_pruned_from_its_parent():
    """6.4 billion parameters become 2.73 (the report's total, closed by 8,064 hidden units: 2.738)."""
    nodes = nodes_of("compute=ddp", scale="paper")
    recipe = compose("pruning", "paper")
    assert nodes["parent"].figures["parameters"] == parameter_counts(recipe.model)["total"]
    assert 6.4e9 <= nodes["parent"].figures["parameters"] < 6.45e9
    on_device = compose("pruning", "paper", ["model=afm_on_device"]).model
    assert nodes["prune"].figures["parameters"] == parameter_counts(on_device)["total"]
    assert 2.73e9 <= nodes["prune"].figures["parameters"] < 2.74e9
    core = nodes["core"].settings.model
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [getattr(core, field) for field in fields] == [getattr(on_device, field) for field in fields]
    assert nodes["masks"].settings.objective.intermediate_size == 8064
    assert (nodes["masks"].settings.tokens, nodes["core"].settings.tokens) == (188e9, 6.3e12)


def test_it_stands_between_what_it_is_made_of_and_what_starts_from_it():
    nodes = nodes_of()
    assert nodes["prune"].inputs == {"starts_from": "masks"}
    assert nodes["prune.evaluate"].inputs == {
        "model": "prune",
        "data": "evaluation.prepare",
        "tokenizer": "tokenizer",
        "starts_from": "masks",
    }
    assert nodes["core"].inputs["starts_from"] == "prune"
    assert "prune.prepare" not in nodes
    by_flow = nodes_of(*BY_FLOW)
    assert by_flow["prune"].inputs == {"starts_from": "masks", "data": "prune.prepare", "tokenizer": "tokenizer"}
    assert by_flow["prune"].figures["flops"] > 0
    assert by_flow["prune"].settings.context == 128  # 4096 of a recipe whose contexts begin at 4096


def test_shares_are_kept_at_a_scale():
    parent = nodes_of()["parent"].settings.model
    assert parent.intermediate_size == 352
    for words, size in (
        ([], 120),  # 352 * 8064 / 23424 = 121.2, as a multiple of 8
        (["model.intermediate_size=64"], 24),  # of the user's own width as large a share: 22.0
        (["model.intermediate_size=64", "stages.prune.intermediate_size=null"], 24),
        (["stages.masks.objective.intermediate_size=40", "stages.prune.intermediate_size=40"], 40),
        (["stages.masks.objective.intermediate_size=40"], 40),  # the one master
    ):
        nodes = nodes_of(*words)
        assert nodes["masks"].settings.objective.intermediate_size == size, words
        assert nodes["core"].settings.model.intermediate_size == size, words
    recipe = compose("pruning", overrides=BY_FLOW)
    half = replace(recipe.stages["prune"], num_hidden_layers=13, num_key_value_heads=4, hidden_size=1536)
    recipe = plan(replace(recipe, stages=recipe.stages | {"prune": half}))
    child = next(node.settings.model for node in recipe.nodes if node.name == "core")
    assert (child.num_hidden_layers, child.num_key_value_heads, child.num_attention_heads) == (2, 2, 4)
    assert (child.hidden_size, child.intermediate_size) == (64, 120)
    small = nodes_of("compute=ddp", scale="small")["core"].settings.model
    assert small.intermediate_size == 968  # 2816 * 8064 / 23424 = 969.4


def test_the_key_knows_measure_sizes_and_what_is_measured():
    def key(*words, seed=0):
        nodes = nodes_of(*words, f"seed={seed}", "scale.corpora.docs.path=null")
        return node_keys(list(nodes.values()), lambda source, where: "text")["prune"]

    sizes = ["stages.prune.intermediate_size=40"]
    keys = [key(), key(*BY_FLOW), key(*BY_SIZE), key(*BY_FLOW, *sizes), key(*BY_FLOW, "stages.prune.tokens=5000")]
    keys += [key(*BY_FLOW, "stages.prune.data.sources.web.weight=3"), key(seed=1)]
    assert len(set(keys)) == len(keys)
    assert key("stages.prune.tokens=5000", "stages.prune.evaluate=false") == keys[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stages.prune.starts_from=null"], "stages.prune.starts_from: has no value: there is no model to be pruned"),
        (["stages.prune.starts_from=parent"], "stages.prune.starts_from: parent has learnt no masks"),
        (["prune@stages.prune.method=magnitude", "stages.prune.starts_from=prune"], "goes round in a circle"),
        (["stages.prune.context=1"], r"stages.prune.context: is 1"),
        (["stages.prune.starts_from=maskss"], "maskss is neither a stage nor a folder .* The nearest is masks"),
        (["stages.prune.num_hidden_layers=3"], "num_hidden_layers: is given, and masks ranks? intermediate_size alone"),
        ([*BY_SIZE, "stages.prune.num_hidden_layers=3"], "num_hidden_layers: is given, and magnitude ranks"),
        ([*BY_FLOW, "stages.prune.intermediate_size=null"], "stages.prune: makes nothing smaller"),
        (["stages.prune.intermediate_size=800"], "is 800, and masks learns masks for 8064"),
        (
            ["stages.masks.objective.intermediate_size=0"],
            "stages.masks.objective.intermediate_size: must be a number of at least 1, is 0, which stages.prune",
        ),
        (["stages.masks.starts_from=null"], "stages.masks.starts_from: has no value: there is no model to be masked"),
        (["stages.masks.objective.budget_ramp=2"], "budget_ramp: is a share"),
        (["stages.prune.intermediate_size=0"], "intermediate_size: must be a number of at least 1"),
        (["prune@stages.prune.method=activations"], "activations.*activation"),
        ([*BY_FLOW, "data@stages.prune.data=qwen2_preferences"], "stages.prune.data: .* holds pairs"),
        (["stages.prune.intermediate_sise=3"], "intermediate_sise .*intermediate_size"),
    ],
)
def test_a_mistake_is_one_line(words, says):
    with pytest.raises(UserError, match=says) as caught:
        compose("pruning", overrides=words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*BY_FLOW, "stages.prune.intermediate_size=400"], r"stages.prune.intermediate_size: lies in \[1, 352\]"),
        ([*BY_FLOW, "stages.prune.num_hidden_layers=5"], r"stages.prune.num_hidden_layers: lies in \[1, 4\]"),
        (
            ["stages.masks.objective.intermediate_size=400", "stages.prune.intermediate_size=null"],
            r"stages.masks.objective.intermediate_size: lies in \[1, 352\]",
        ),
        (["model=qwen2_57b_a14b"], "stages.masks.starts_from: num_experts of the model is 8, and only dense models"),
        ([*BY_SIZE, "model=llama3_1_8b", "stages.prune.hidden_size=100"], "hidden_size: 100 is no multiple"),
    ],
)
def test_what_a_model_does_not_have_is_refused_in_the_plan(words, says):
    with pytest.raises(UserError, match=says) as caught:
        plan(compose("pruning", overrides=words))
    assert "\n" not in str(caught.value)


def test_masks_of_elsewhere_say_what_they_were_learnt_for(talker, tmp_path):
    backbone = Transformer.from_pretrained(talker)
    masked = MaskedTransformer.from_backbone(backbone, seed=0)
    masked.budget = 24.0
    masked.save_pretrained(tmp_path / "masked")
    shutil.copy(talker / "tokenizer.json", tmp_path / "masked")
    words = [f"stages.prune.starts_from={tmp_path}/masked", "until=prune"]

    def units(*more):
        stages = {"prune": compose("pruning", overrides=[*words, *more]).stages["prune"]}
        return units_of_masks("prune", stages["prune"], stages)

    assert units("stages.prune.intermediate_size=null") == units("stages.prune.intermediate_size=24") == 24
    with pytest.raises(UserError, match=r"intermediate_size: is 32, and the masks of .* were learnt for 24\. .* null"):
        units("stages.prune.intermediate_size=32")
    scores = read_scores(tmp_path / "masked")
    save_file({"scores": scores}, tmp_path / "masked" / MASKS_FILE)  # as an older file
    assert units("stages.prune.intermediate_size=32") == 32
    with pytest.raises(UserError, match="does not say what its masks were learnt for"):
        units("stages.prune.intermediate_size=null")
    (tmp_path / "masked" / MASKS_FILE).unlink()
    with pytest.raises(UserError, match=r"stages.prune.starts_from: .* has learnt no masks.*activation"):
        units()


def test_a_reward_model_is_not_pruned():
    words = ["+stage@stages.reward=reward_model", "stages.reward.starts_from=core", "stages.reward.lr.peak=1e-5"]
    words += ["stages.reward.tokens=1e8", "stages.reward.batch_tokens=1e5", "stages.prune.starts_from=reward"]
    words += [*BY_SIZE, "stages.core.starts_from=masks"]
    with pytest.raises(UserError, match=r"stages.prune.starts_from: reward is a reward model"):
        compose("pruning", overrides=words)


@pytest.mark.slow
def test_a_run_by_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    """Pre-training, masks, the cut and training on: in transformers' class, and none of it made a second time."""
    import transformers

    monkeypatch.chdir(tmp_path)
    words = [word for word in tiny if not word.startswith(("stages.", "evaluation.preference"))]
    words += ["stages.core.learns_from=null", "objective@stages.core.objective=causal_lm"]  # its own tests distil
    words += ["scale.phases.masks.tokens=15_000", "stages.prune.evaluate=false", "stages.parent.evaluate=false"]
    assert cli.command(["run", "recipe=pruning", *words]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    stages = json.loads((folder / "run.json").read_text())["stages"]
    assert stages["prune"]["metrics"]["parameters/share"] < 1

    def weights(name):
        return load_file(folder / "artifacts" / name / "model" / "model.safetensors")

    units = json.loads((folder / "artifacts" / "prune" / "kept.json").read_text())["units"]
    whole, child = weights("masks"), weights("prune")
    for layer, stay in enumerate(units):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert torch.equal(whole[name][:, stay], child[name])
    parent, core = (read_config(folder / "artifacts" / name / "model") for name in ("parent", "core"))
    assert (parent.intermediate_size, core.intermediate_size) == (64, 24)
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder / "artifacts" / "core" / "model")
    assert theirs.config.intermediate_size == 24
    lines = [json.loads(line) for line in (folder / "artifacts/core/metrics.jsonl").read_text().splitlines()]
    held_out = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert held_out[-1] < held_out[0]
    assert cli.command(["report", str(folder)]) == 0
    assert "| prune |" in (folder / "report.md").read_text()

    # by another measure: masks are not learnt again
    words = [*words, *BY_FLOW, "stages.prune.starts_from=parent", "stages.prune.num_hidden_layers=1", "until=prune"]
    assert cli.command(["run", "recipe=pruning", *words, "stages.prune.tokens=4000"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    stages = json.loads((folder / "run.json").read_text())["stages"]
    assert {name for name, stage in stages.items() if not stage["reused"]} <= {"prune", "prune.prepare"}
    shape = read_config(folder / "artifacts" / "prune" / "model")
    assert (shape.num_hidden_layers, shape.intermediate_size) == (1, 24)
