"""Stages with a mixture of experts: it learns, its balance is written down, and two processes train it as one does."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.objectives.config import CausalLMConfig, DPOConfig
from lightning_llm.optimization.config import AdamWConfig, LearningRateConfig
from lightning_llm.stages import score, train
from lightning_llm.stages.config import ComputeConfig, ScoreSettings, TrainSettings

MODEL = ModelConfig(
    name="tiny",
    family="qwen2_moe",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=64,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    shared_expert_intermediate_size=24,
)


def settings(data_config, form, tokens, **named):
    return TrainSettings(
        **{
            "model": MODEL,
            "objective": DPOConfig() if form == "pairs" else CausalLMConfig(),
            "optimizer": AdamWConfig(eps=1e-5),
            "data": data_config(form),
            "lr": LearningRateConfig("constant", peak=5e-3),
            "tokens": tokens,
            "context": [{"at": 0, "value": 64}],
            "batch_tokens": [{"at": 0, "value": 600}],
            "rope_theta": None,
            "precision": "fp32",
            "seed": 3,
            **named,
        }
    )


def lines(context):
    return [json.loads(line) for line in (context.output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pretrained(data_config, prepared, tokenizer_artifact, context_of):
    inputs = {"data": prepared["text"], "tokenizer": tokenizer_artifact}
    context = context_of(settings(data_config, "text", 12_000), inputs)
    train.run(context)
    return context


def test_it_learns_and_says_how_even_its_load_is(pretrained):
    training = [line for line in lines(pretrained) if "loss" in line]
    assert training[-1]["loss"] < training[0]["loss"] - 1.5
    for line in training:
        assert 1 <= line["router/imbalance"] <= 3
        assert 1.5 < line["router/aux_loss"] <= 6


def test_dpo_follows_with_reference_scores_or_online(pretrained, data_config, prepared, tokenizer_artifact, context_of):
    scored = {"model": pretrained.output, "data": prepared["pairs"]}
    reference = context_of(ScoreSettings(64, ["train", "validation"], "fp32"), scored)
    score.run(reference)
    inputs = {"data": prepared["pairs"], "tokenizer": tokenizer_artifact, "starts_from": pretrained.output}
    pairs = settings(data_config, "pairs", 3000, lr=LearningRateConfig("constant", peak=1e-3))
    weights = []
    for context in (context_of(pairs, inputs | {"reference": reference.output}), context_of(pairs, inputs)):
        train.run(context)
        training = [line for line in lines(context) if "loss" in line]
        assert training[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-3)
        assert training[-1]["rewards/margins"] > training[0]["rewards/margins"]
        assert 1.5 < training[-1]["router/aux_loss"] <= 6
        weights.append(load_file(context.output / "model" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("form", ["text", "pairs"])
def test_two_processes_make_the_update_of_one(
    form, data_config, prepared, tokenizer_artifact, pretrained, context_of, tmp_path
):
    """Without the balance's weight: its mean by tokens depends on how a window is shared out."""
    start = Transformer.from_pretrained(pretrained.output / "model")
    start.config = dataclasses.replace(start.config, router_aux_loss_coef=0.0)
    start.save_pretrained(tmp_path / "model")
    for path in (pretrained.output / "model").glob("*token*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    inputs = {"data": prepared[form], "tokenizer": tokenizer_artifact, "starts_from": tmp_path}
    one_step = settings(
        data_config, form, 1500, lr=LearningRateConfig("constant", peak=1e-3), batch_tokens=[{"at": 0, "value": 1500}]
    )
    alone = context_of(one_step, inputs)
    train.run(alone)
    both = context_of(one_step, inputs, compute=ComputeConfig(devices=2, strategy="ddp", micro_batch_tokens=256))
    train.run(both)
    expected, found = (load_file(context.output / "model" / "model.safetensors") for context in (alone, both))
    for name, weight in expected.items():
        torch.testing.assert_close(weight, found[name], rtol=0, atol=1e-5, msg=name)
    last = [next(line for line in reversed(lines(context)) if "loss" in line) for context in (alone, both)]
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], rel=1e-4)
    assert last[0]["router/aux_loss"] == pytest.approx(last[1]["router/aux_loss"], rel=0.2)


def test_the_recipe_runs_with_experts(tiny, tmp_path):
    from lightning_llm import compose, run

    words = [word for word in tiny if not word.startswith("model.intermediate_size")]
    words += ["model=qwen2_57b_a14b", "model.moe_intermediate_size=12", "model.shared_expert_intermediate_size=24"]
    record = run(compose("qwen2", overrides=[*words, f"store.root={tmp_path}/artifacts", f"runs={tmp_path}/runs"]))
    result = json.loads((record.folder / "run.json").read_text())["stages"]
    assert {"pretrain", "long_context", "sft", "dpo"} <= result.keys()
    for stage in ("pretrain", "long_context", "sft", "dpo"):
        config = json.loads((record.folder / "artifacts" / stage / "model" / "config.json").read_text())
        assert (config["model_type"], config["num_experts"], config["num_experts_per_tok"]) == ("qwen2_moe", 8, 2)
        assert config["architectures"] == ["Qwen2MoeForCausalLM"]
        assert {"router/aux_loss", "router/imbalance"} <= result[stage]["metrics"].keys()
    assert result["dpo"]["metrics"]["perplexity/web"] > 1
