"""What a plan says beforehand: FLOPs of models and of devices, memory of optimizers, and data that is not there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_llm import compose, plan
from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.reward import RewardModel
from lightning_llm.models.size import (
    ScoreHead,
    forward_flops_per_token,
    parameter_counts,
    recomputed_flops_per_token,
    training_flops,
    training_flops_per_token,
)
from lightning_llm.objectives.config import DPOConfig
from lightning_llm.settings import UserError

GIB = 2**30


def figures(recipe, name="pretrain"):
    return next(node.figures for node in plan(recipe).nodes if node.name == name)


def composed(tiny, *words):
    return compose("qwen2", overrides=[*tiny, *words])


def test_layers_that_run_again_cost_the_device_and_not_the_model(tiny):
    kept, again = composed(tiny), composed(tiny, "compute.activation_checkpointing=full")
    one, other = figures(kept), figures(again)
    assert one["flops"] == one["hardware_flops"] == other["flops"]
    model = plan(kept).recipe.model
    unneeded = (model.vocab_size + model.num_hidden_layers * model.intermediate_size) * model.hidden_size
    extra = one["flops"] / 3 - 2 * unneeded * one["tokens"]  # a forward pass but the head and each layer's last product
    assert other["hardware_flops"] - other["flops"] == pytest.approx(extra, rel=1e-9)
    rate = kept.compute.flops_per_second * kept.compute.efficiency
    assert (one["seconds"], other["seconds"]) == (one["flops"] / rate, other["hardware_flops"] / rate)
    assert other["memory_gib"] < one["memory_gib"]
    scores = [figures(recipe, "dpo.reference") for recipe in (kept, again)]
    assert scores[0] == scores[1]  # without a backward pass nothing runs again
    whole = plan(again)
    assert whole.hardware_flops > whole.flops == plan(kept).flops
    assert whole.to_json()["hardware_flops"] == whole.hardware_flops
    assert "again in backward passes" in str(whole)
    assert "again in backward passes" not in str(plan(kept))


GEMMA2 = {
    "family": "gemma2", "post_norms": True, "norms_add_one": True, "scale_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("family", [GEMMA2, {"family": "llama"}], ids=lambda family: family["family"])
def test_what_runs_again_is_what_torch_counts(family):
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=False, **family,
    )  # fmt: skip
    model = Transformer(config)
    model.reset_parameters(0)
    batch = SegmentBatch.from_documents([[token] for token in range(1, 41)])  # attention of one key costs all its pairs
    counted = []
    for model.activation_checkpointing in (False, True):
        with FlopCounterMode(display=False) as counter:
            model(batch).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == pytest.approx(40 * recomputed_flops_per_token(config, 1), rel=1e-9)
    head = 2 * 40 * config.vocab_size * config.hidden_size
    assert counted[0] == pytest.approx(training_flops(config, [(1, 0)] * 40) - 3 * head, rel=0.02)


def test_a_reward_model_reads_all_that_was_sampled(tiny):
    words = [*tiny, "stages.sample.prompts=50", "stages.sample.per_prompt=4", "stages.sample.max_new_tokens=10"]
    words = [word for word in words if not word.startswith(("stages.online_dpo", "stages.reward_model"))]
    words += ["stages.sample.models=[sft,dpo]", "stages.score.judged_by=[first,second]"]
    words += ["judge@stages.score.judge=reward_model", "stages.best.minimum_score=null"]
    for name in ("first", "second"):
        words += [f"+stage@stages.{name}=reward_model", f"stages.{name}.starts_from=sft", f"stages.{name}.lr.peak=1e-5"]
        words += [f"stages.{name}.tokens=2e4", f"stages.{name}.batch_tokens=1e3", f"stages.{name}.context=1024"]
    nodes = {node.name: node for node in plan(compose("rejection_sampling", overrides=words)).nodes}
    sample, score = nodes["sample"].figures, nodes["score"].figures
    prompt = 14  # tokens, in conf/scale/nano.yaml
    assert sample["tokens"] == 2 * 50 * (prompt + 4 * 10)
    assert sample["flops"] == pytest.approx(sample["tokens"] * forward_flops_per_token(nodes["sft"].settings.model, 24))
    assert sample["seconds"] == pytest.approx(sample["flops"] / 2e11 / 0.2)
    shape, head = nodes["sft"].settings.model, ScoreHead()
    assert score["tokens"] == sample["tokens"]
    assert score["flops"] == pytest.approx(2 * sample["tokens"] * forward_flops_per_token(shape, 24, head))
    assert score["starts_from"] == "sample"
    assert nodes["score"].inputs == {"samples.0": "sample", "reward_model.0": "first", "reward_model.1": "second"}


def test_a_reward_model_costs_no_vocabulary(tiny):
    words = ["stages.reward_model.examples=1000", "stages.reward_model.objective.graded=[verbosity]"]
    nodes = {node.name: node for node in plan(compose("qwen2", overrides=[*tiny, *words])).nodes}
    trained, evaluated = nodes["reward_model"], nodes["reward_model.evaluate"]
    shape, head = trained.settings.model, ScoreHead(graded=1)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in RewardModel(shape, ["verbosity"]).parameters())
    assert trained.figures["parameters"] == evaluated.figures["parameters"] == parameters
    assert parameters == parameter_counts(shape, head)["total"]
    assert trained.figures["flops"] == pytest.approx(47_000 * training_flops_per_token(shape, 47, head))
    assert evaluated.inputs == {"model": "reward_model", "data": "reward_model.prepare", "tokenizer": "tokenizer"}
    assert evaluated.figures["flops"] == pytest.approx(47_000 * training_flops_per_token(shape, 47, head) / 3)
    assert evaluated.figures["tokens"] == 47_000  # a thousand comparisons


def test_memory_is_that_of_the_optimizer(tiny):
    adamw = figures(composed(tiny))
    parameters = adamw["parameters"]
    for name, saved in (("lion", 4 * parameters), ("afm_rmsprop", 0)):
        other = figures(composed(tiny, f"optimizer@stages.pretrain.optimizer={name}"))
        assert (adamw["memory_gib"] - other["memory_gib"]) * GIB == pytest.approx(saved, abs=1)
    model = plan(composed(tiny)).recipe.model
    with torch.device("meta"):
        layers = Transformer(model).layers
    matrices = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim >= 2)
    muon = figures(composed(tiny, "optimizer@stages.pretrain.optimizer=muon"))
    assert (adamw["memory_gib"] - muon["memory_gib"]) * GIB == pytest.approx(4 * matrices, abs=1)


def test_data_that_is_not_here_is_a_note(tiny, tmp_path):
    path = tmp_path / "chats.jsonl"
    words = [
        "data@stages.sft.data=own_conversations", f"stages.sft.data.sources.mine.path={path}",
        "stages.sft.data.tokens_per_example=20", f'stages.dpo.data.sources.preferences.path="{tmp_path}/pairs/*.jsonl"',
    ]  # fmt: skip
    drawn = plan(composed(tiny, *words))
    notes = [note for note in drawn.notes if str(tmp_path) in note]
    assert [note.partition(":")[0] for note in notes] == ["sft.prepare", "dpo.prepare"]
    assert all(note in str(drawn) for note in notes)
    assert json.loads(json.dumps(drawn.to_json()))["notes"] == list(drawn.notes)
    assert not [note for note in drawn.selected(until="pretrain").notes if "chats.jsonl" in note]
    path.write_text("")
    assert "chats.jsonl" not in str(plan(composed(tiny, *words)))
    assert plan(composed(tiny)).notes == ()


def test_a_recipe_that_was_changed_in_python_is_checked_again(tiny):
    recipe = composed(tiny)
    stages = recipe.stages | {"sft": replace(recipe.stages["sft"], objective=DPOConfig())}
    with pytest.raises(UserError, match=r"stages\.sft\.data: .* holds conversations, and dpo does not learn from that"):
        plan(replace(recipe, stages=stages))
