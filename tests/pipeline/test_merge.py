"""Merging in a recipe: edges, keys, plan, mistakes, and real runs by the command line."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_llm import cli, compose, plan, run
from lightning_llm.merging.config import BLOCK
from lightning_llm.merging.spherical import slerp_task_vectors
from lightning_llm.models import Transformer
from lightning_llm.models.reward import RewardModel
from lightning_llm.pipeline.key import node_keys
from lightning_llm.settings import UserError

MEAN = ["+stage@stages.mean=merge", "stages.mean.models=[sft,dpo]"]
ARC = [*MEAN, "stages.mean.starts_from=long_context", "merge@stages.mean.method=slerp"]
MORE = [
    "+stage@stages.more=sft",
    "stages.more.phase=selected",  # sft's rates are scaled by the highest of its phase
    "stages.more.starts_from=mean",
    "stages.more.lr.peak=7e-6",
    "stages.more.context=1024",
    "stages.more.batch_tokens=1e6",
    "stages.more.examples=100",
]
REWARD = ("starts_from=sft", "examples=100", "context=1024", "batch_tokens=1024", "lr.peak=3e-5")
COMMITTEE = [
    word
    for name in ("first", "second")
    for word in [f"+stage@stages.{name}=reward_model", *(f"stages.{name}.{setting}" for setting in REWARD)]
] + ["stages.second.seed_offset=1", "+stage@stages.warm=merge", "stages.warm.models=[first,second]"]
COMMITTEE += ["merge@stages.warm.method=warm"]


@functools.cache
def nodes_of(*words):
    return {node.name: node for node in plan(compose("qwen2", overrides=words)).nodes}


def test_it_stands_between_its_models_and_what_starts_from_it():
    nodes = nodes_of(*ARC, *MORE)
    assert nodes["mean"].inputs == {"model.0": "sft", "model.1": "dpo", "starts_from": "long_context"}
    assert nodes["mean.evaluate"].inputs["starts_from"] == "long_context"
    assert nodes["more"].inputs["starts_from"] == "mean"
    names = list(nodes)
    assert names.index("dpo") < names.index("mean") < names.index("more")
    assert nodes["more"].settings.model == nodes["sft"].settings.model
    figures = nodes["mean"].figures
    assert figures["parameters"] == nodes["sft"].figures["parameters"]
    assert figures["disk_gib"] == nodes["sft"].figures["disk_gib"]
    assert figures["memory_gib"] > 0
    [paper] = [node for node in plan(compose("qwen2", "paper", ARC)).nodes if node.name == "mean"]
    figures = paper.figures  # of 7B weights: the largest tensor, and four blocks of each model
    assert figures["memory_gib"] == pytest.approx(4 * (152_064 * 3584 + 3 * 4 * BLOCK) / 2**30, rel=0.02)
    assert figures["memory_gib"] < figures["disk_gib"] / 10


def test_the_key_knows_models_method_and_order():
    def key(*words, seed=0):
        nodes = nodes_of(*words, f"seed={seed}", "scale.corpora.docs.path=null")
        return node_keys(list(nodes.values()), lambda source, where: "text")["mean"]

    methods = ["liti", "ties", "dare", "task_arithmetic"]
    one = [*MEAN, "stages.mean.models=[dpo]", "stages.mean.starts_from=sft"]
    keys = [key(*MEAN), key(*MEAN, "stages.mean.models=[dpo,sft]"), key(*ARC)]
    keys.append(key(*MEAN, "stages.mean.starts_from=pretrain"))
    keys += [key(*one, f"merge@stages.mean.method={name}") for name in methods]
    assert len(set(keys)) == len(keys)
    assert key(*MEAN, "stages.mean.evaluate=false") == keys[0]


def test_only_a_method_that_draws_has_a_seed():
    given = [*MEAN, "stages.mean.starts_from=pretrain", "seed=3"]
    assert nodes_of(*given)["mean"].settings.seed == 0
    assert nodes_of(*given, "merge@stages.mean.method=dare")["mean"].settings.seed == 3


LOOP = """# @package _global_
defaults:
  - qwen2
  - /stage@stages.warp: rounds
  - /stage@stages.warp.stages.one: dpo
  - /stage@stages.warp.stages.two: dpo
  - /stage@stages.warp.stages.arc: merge
  - /stage@stages.warp.stages.init: merge
  - override /merge@stages.warp.stages.arc.method: slerp
  - override /merge@stages.warp.stages.init.method: liti
  - _self_
stages:
  warp:
    rounds: 2
    begins_with: {init: sft}
    stages:
      one: &policy
        starts_from: previous_round.init
        examples: 60_000
        context: 32_768
        batch_tokens: 1.0e+5
        lr: {peak: 5.0e-7}
        optimizer: {online_merging: {method: ondare, base: pretrain}}
      two: {<<: *policy, seed_offset: 1, optimizer: {online_merging: {method: onties, base: previous_round.arc}}}
      arc: {models: [one, two], starts_from: previous_round.init}
      init: {models: [arc], starts_from: previous_round.init, method: {eta: 0.3}}
"""


def test_a_loop_of_merges_is_made_of_rounds(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "loop.yaml").write_text(LOOP.replace("{init: sft}", "{init: sft, arc: long_context}"))
    nodes = {node.name: node.inputs for node in plan(compose("loop", config_dir=tmp_path)).nodes}
    assert nodes["warp1.arc"] == {"model.0": "warp1.one", "model.1": "warp1.two", "starts_from": "sft"}
    assert nodes["warp1.init"] == {"model.0": "warp1.arc", "starts_from": "sft"}
    assert nodes["warp2.init"] == {"model.0": "warp2.arc", "starts_from": "warp1.init"}
    assert nodes["warp2.one"]["starts_from"] == nodes["warp2.one"]["merging_reference"] == "warp1.init"
    assert nodes["warp1.two"]["merging_base"] == "long_context"
    assert nodes["warp2.two"]["merging_base"] == "warp1.arc"
    (tmp_path / "recipe" / "loop.yaml").write_text(LOOP)
    with pytest.raises(UserError, match=r"stages.warp.stages.two.optimizer.online_merging.base: .* the first has none"):
        compose("loop", config_dir=tmp_path)


def test_reward_models_are_evaluated_on_what_the_first_holds_out():
    nodes = nodes_of(*COMMITTEE)
    assert nodes["warm.evaluate"].inputs == {"data": "first.prepare", "tokenizer": "tokenizer", "model": "warm"}
    assert nodes["warm"].figures["parameters"] == nodes["first"].figures["parameters"]


def test_an_offset_moves_the_order_of_data_and_not_what_is_drawn():
    nodes = nodes_of(*COMMITTEE, "stages.sft.seed_offset=5", "seed=3")
    first, second = (nodes[name].settings for name in ("first", "second"))
    assert (first.seed, second.seed) == (3, 4)
    assert first.draws_by == second.draws_by == 3
    assert first.seed_of_parameters is None  # its key is as it was before there was such a setting
    assert (nodes["sft"].settings.seed, nodes["sft"].settings.seed_of_parameters) == (8, None)  # nothing is drawn
    begun = nodes_of("stages.pretrain.seed_offset=1")["pretrain"].settings  # random weights
    assert (begun.seed, begun.draws_by) == (1, 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stages.mean.models=[]"], "stages.mean.models: names nobody"),
        (["stages.mean.models=[sft]"], "stages.mean.models: names 1, and linear merges at least 2"),
        (["stages.mean.models=[sft,sft]"], "stages.mean.models: names sft twice"),
        (["stages.mean.models=[sft,dpoo]"], "stages.mean.models: dpoo is neither .* The nearest is dpo"),
        (["stages.mean.models=[sft,mean]"], "goes round in a circle"),
        (["stages.mean.models=[mean,sft]"], "goes round in a circle"),
        (["stages.mean.method.weights=[0.5,0.6]"], "weights: must add up to 1, got 1.1"),
        (["stages.mean.method.weights=[0.5,0.3,0.2]"], "names 2, and method.weights are 3"),
        (["merge@stages.mean.method=ties"], "stages.mean.starts_from: has no value, and ties merges"),
        (["merge@stages.mean.method=liti", "stages.mean.starts_from=sft"], "starts_from: is one of the models"),
        (["merge@stages.mean.method=liti", "stages.mean.starts_from=pretrain"], "names 2, and liti merges exactly 1"),
        (["merge@stages.mean.method=slrp"], "slrp.* slerp"),
        (["merge@stages.mean.method=warm"], "stages.mean.models: sft is a language model"),
        (["merge@stages.mean.method=ties", "stages.mean.method.density=0"], r"density: must lie in \(0, 1\]"),
        (["stages.sft.starts_from=evaluate"], "neither a stage nor a folder"),
        ([*COMMITTEE, "stages.mean.models=[first,sft]"], "stages.mean.models: sft is a language model"),
        ([*COMMITTEE, "stages.mean.models=[sft,first]"], "stages.mean.models: first is a reward model"),
        ([*COMMITTEE, "stages.dpo.starts_from=warm"], "stages.dpo.starts_from: warm is a reward model"),
    ],
)
def test_a_mistake_is_one_line(words, says):
    with pytest.raises(UserError, match=says) as caught:
        compose("qwen2", overrides=[*MEAN, *words])
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def given(beside, tmp_path_factory):
    """What a finished run was told: its artifacts are reused."""
    return beside(tmp_path_factory.mktemp("merged"))


@pytest.mark.slow
def test_a_run_by_the_command_line(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*given, *ARC, *MORE, "stages.more.evaluate=false"]
    assert cli.command(["run", "recipe=qwen2", *words]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    stages = json.loads((folder / "run.json").read_text())["stages"]
    made = [name for name, stage in stages.items() if not stage["reused"]]
    assert set(made) - {"more.prepare"} == {"mean", "mean.evaluate", "more"}

    def weights(name):
        return load_file(folder / "artifacts" / name / "model" / "model.safetensors")

    expected = slerp_task_vectors(weights("long_context"), [weights("sft"), weights("dpo")])
    for name, tensor in weights("mean").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    assert 0 < stages["mean"]["metrics"]["task_vectors/angle"] < 90
    assert {"tasks/exact_match", "judge/both_wrong"} <= stages["mean"]["metrics"].keys()
    Transformer.from_pretrained(folder / "artifacts" / "mean" / "model")
    assert cli.command(["report", str(folder)]) == 0
    assert "| mean |" in (folder / "report.md").read_text().partition("## Evaluation")[2]
    assert cli.command(["generate", f"model={folder}/artifacts/mean", "prompt=one", "max_new_tokens=3"]) == 0
    assert cli.command(["run", "recipe=qwen2", *words]) == 0  # once more: nothing is made
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert all(stage["reused"] for stage in json.loads((folder / "run.json").read_text())["stages"].values())


@pytest.mark.slow
def test_reward_models_of_a_committee_begin_with_one_head(given):
    """At a rate too small to change a weight: what they end with is what they began with."""
    still = [word.replace("lr.peak=3e-5", "lr.peak=1e-30") for word in COMMITTEE]
    record = run(
        compose("qwen2", overrides=[*given, *still, "scale.corpora.comparisons.options.rows=300"]), until="warm"
    )
    one, two, both = (RewardModel.from_pretrained(record.artifact(n) / "model") for n in ("first", "second", "warm"))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name
        torch.testing.assert_close(parameter, both.get_parameter(name))
    journals = [(record.artifact(name) / "metrics.jsonl").read_text().splitlines() for name in ("first", "second")]
    losses = [[line["loss"] for line in map(json.loads, journal) if "loss" in line] for journal in journals]
    assert losses[0]
    assert losses[0] != losses[1]  # of one model: other rows in each step


@pytest.mark.slow
def test_warm_is_a_reward_model_that_judges_and_directories_merge_alone(given, tmp_path):
    corpus = "scale.corpora.comparisons.options.rows=300"
    record = run(compose("qwen2", overrides=[*given, *COMMITTEE, corpus]), until="warm")
    one, two, both = (RewardModel.from_pretrained(record.artifact(n) / "model") for n in ("first", "second", "warm"))
    torch.testing.assert_close(both.score.weight, (one.score.weight + two.score.weight) / 2)
    assert not torch.equal(one.norm.weight, two.norm.weight)
    assert 0 <= record.stages["warm"]["metrics"]["preference/accuracy"] <= 1

    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "soup.yaml").write_text(
        "# @package _global_\ndefaults: [/model: qwen2_7b, /stage@stages.soup: merge, _self_]\n"
        f"stages: {{soup: {{models: ['{record.artifact('first')}', '{record.artifact('second')}']}}}}\n"
    )
    stores = [word for word in given if word.startswith(("store", "runs", "compute"))]
    soup = run(compose("soup", overrides=stores, config_dir=tmp_path))
    merged = RewardModel.from_pretrained(soup.artifact("soup") / "model")
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, dict(both.named_parameters())[name])


def test_a_folder_is_one_however_it_is_spelt(talker):
    with pytest.raises(UserError, match=rf"stages\.mean\.models: names {talker} twice"):
        compose("qwen2", overrides=[*MEAN, f"stages.mean.models=[{talker},{talker}/]"])


def test_models_of_elsewhere_that_speak_are_no_reward_models(talker, tmp_path):
    words = [*MEAN, f"stages.mean.models=[{talker},{tmp_path}/other]", "merge@stages.mean.method=warm"]
    shutil.copytree(talker, tmp_path / "other")
    stored = [f"store.root={tmp_path}/artifacts", f"runs={tmp_path}/runs"]
    with pytest.raises(UserError, match=r"^stages\.mean\.models: .* speaks, and warm is for reward models"):
        run(compose("qwen2", overrides=[*words, *stored]), until="mean")
