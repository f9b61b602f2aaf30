"""The stage evaluate of a reward model: rows of all sources, what is there to measure, and what is refused."""

import io
import json

import pytest

from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.reward import RewardModel
from lightning_llm.models.size import forward_flops
from lightning_llm.settings import UserError
from lightning_llm.stages import evaluate, prepare
from lightning_llm.stages.config import EvaluateRewardsSettings, PrepareSettings
from lightning_llm.training.console import Console

SETTINGS = EvaluateRewardsSettings(comparisons=30, context=128, on_long="drop", precision="fp32")


@pytest.fixture(scope="module")
def prepare_rows(tokenizer_artifact, context_of):
    def make(validation, **sources):
        data = DataConfig(name="rankings", form="rankings", sources=sources, validation=validation)
        context = context_of(
            PrepareSettings(data, [128], ["train", "validation"], seed=0), {"tokenizer": tokenizer_artifact}
        )
        prepare.run(context)
        return context.output

    return make


@pytest.fixture(scope="module")
def model(tokenizer_artifact, tmp_path_factory):
    tokenizer = Tokenizer.load(tokenizer_artifact / "tokenizer")
    backbone = Transformer(
        ModelConfig(
            name="tiny", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        )
    )  # fmt: skip
    backbone.reset_parameters(0)
    folder = tmp_path_factory.mktemp("artifact")
    RewardModel.from_backbone(backbone, seed=1).save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    return folder


def test_every_source_has_its_share(prepare_rows, corpus, model, tokenizer_artifact, context_of):
    comparisons = SourceConfig(path="embedded:comparisons", options={"rows": 24, "held_out": 24})
    data = prepare_rows(0.4, comparisons=comparisons, own=SourceConfig(path=str(corpus / "pairs.jsonl")))
    context = context_of(SETTINGS, {"model": model, "data": data, "tokenizer": tokenizer_artifact})
    result = evaluate.run(context)
    table = json.loads((context.output / "calibration.json").read_text())
    assert {entry["strength"]: entry["pairs"] for entry in table} == {
        "all": 30, "unknown": 15, "slightly": 4, "clearly": 4, "significantly": 7,
    }  # fmt: skip
    assert 0 <= result.metrics["preference/accuracy"] <= 1
    assert "preference/edited_first" in result.metrics
    assert json.loads((context.output / "metrics.json").read_text()) == result.metrics
    built = RewardModel.from_pretrained(model / "model")
    assert 0 < result.flops < forward_flops(built.config, [(128, 0)] * 30, built.score_head)


def test_half_precision_changes_little(prepare_rows, model, tokenizer_artifact, context_of):
    data = prepare_rows(0.4, own=SourceConfig(path="embedded:comparisons", options={"rows": 24, "held_out": 24}))
    inputs = {"model": model, "data": data, "tokenizer": tokenizer_artifact}
    single, half = (
        evaluate.run(context_of(EvaluateRewardsSettings(24, 128, "drop", precision), inputs)).metrics
        for precision in ("fp32", "bf16")
    )
    assert half["preference/margins"] == pytest.approx(single["preference/margins"], abs=0.1)
    assert half["preference/margins"] != single["preference/margins"]


def test_data_that_holds_nothing_out_is_said(prepare_rows, corpus, model, tokenizer_artifact, context_of):
    data = prepare_rows(0.0, own=SourceConfig(path=str(corpus / "pairs.jsonl")))
    context = context_of(SETTINGS, {"model": model, "data": data, "tokenizer": tokenizer_artifact})
    said = io.StringIO()
    context.console = Console(1, said).stage(1, "reward_model.evaluate", "evaluate")
    assert evaluate.run(context).metrics == {}
    assert "its data holds out no row" in said.getvalue()


def test_a_model_that_speaks_is_refused(prepare_rows, corpus, model, tokenizer_artifact, context_of, tmp_path):
    data = prepare_rows(0.4, own=SourceConfig(path=str(corpus / "pairs.jsonl")))
    config = RewardModel.from_pretrained(model / "model").config
    speaks = Transformer(config)
    speaks.reset_parameters(0)
    speaks.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a language model, a reward model is asked for"):
        evaluate.run(context_of(SETTINGS, {"model": tmp_path, "data": data, "tokenizer": tokenizer_artifact}))
