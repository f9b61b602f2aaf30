"""The stage evaluate: which figures come out, that they are right at both ends of ability, and what is refused."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.evaluation.config import EvaluationConfig
from lightning_llm.evaluation.preference import response_logps
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.settings import UserError
from lightning_llm.stages import evaluate, prepare
from lightning_llm.stages.config import EvaluateSettings, PrepareSettings

SIZES = EvaluationConfig(
    text_tokens=500, long_documents=6, questions=8, preference_pairs=12, max_new_tokens=12, samples=3
)


@pytest.fixture(scope="module")
def held_out(corpus, tokenizer_artifact, context_of, tmp_path_factory):
    long_texts = tmp_path_factory.mktemp("texts") / "long.jsonl"
    prose = [json.loads(line)["text"] for line in (corpus / "prose.jsonl").read_text().splitlines()]
    rows = [{"text": " ".join(prose[begin : begin + 10])} for begin in range(0, len(prose), 10)]
    long_texts.write_text("\n".join(map(json.dumps, rows)))
    sources = {
        "text/prose": SourceConfig(path=str(long_texts)),
        "text/lists": SourceConfig(path=str(corpus / "lists.jsonl")),
        "tasks/tasks": SourceConfig(path="embedded:tasks", options={"questions": 3}),
        "pairs/preferences": SourceConfig(path="embedded:preferences", options={"held_out": 20}),
    }
    data = DataConfig(name="evaluation", sources=sources, validation=0.4)
    context = context_of(PrepareSettings(data, [16, 128], ["validation"], seed=0), {"tokenizer": tokenizer_artifact})
    prepare.run(context)
    return context.output


def build_model(seed: int, tokenizer: Tokenizer) -> Transformer:
    config = ModelConfig(
        name="tiny",
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.3,
    )
    model = Transformer(config)
    model.reset_parameters(seed)
    return model


@pytest.fixture(scope="module")
def tokenizer(tokenizer_artifact):
    return Tokenizer.load(tokenizer_artifact / "tokenizer")


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """Two model artifacts with different random weights."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("artifact")
        build_model(seed, tokenizer).save_pretrained(folder / "model")
        tokenizer.save(folder / "model")
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def evaluated(held_out, tokenizer_artifact, context_of):
    def make(model, starts_from=None, mode="likelihood", context=16, full_context=128, precision="fp32"):
        inputs = {"model": model, "data": held_out, "tokenizer": tokenizer_artifact}
        inputs |= {"starts_from": starts_from} if starts_from else {}
        settings = EvaluateSettings(SIZES, context, full_context, mode, precision, seed=0)
        stage = context_of(settings, inputs)
        return evaluate.run(stage).metrics, stage.output

    return make


PERPLEXITY = {"perplexity/prose", "perplexity/lists"}
TASKS = {"tasks/exact_match", "tasks/reverse", "tasks/sort", "tasks/largest", "tasks/sum"}
RESPONSES = {"responses/complete", "responses/bare", "responses/working"}
LATE = {"late_loss/full", "late_loss/short", "late_loss/gain", "late_loss/gain_error"}
JUDGE = {"judge/both_wrong", "judge/strict_win_rate"}  # of models that know nothing; else judge/win_rate, its ends, too


def test_a_first_stage_has_no_predecessor_to_compare_with(evaluated, models):
    metrics, output = evaluated(models[0], context=128)
    assert set(metrics) == PERPLEXITY | TASKS | RESPONSES | {"preference/accuracy"}
    assert metrics["tasks/exact_match"] == 0
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert json.loads((output / "loss_by_position.json").read_text())["context"] == 128
    samples = json.loads((output / "samples.json").read_text())
    assert len(samples) == SIZES.samples == len({sample["task"] for sample in samples})
    assert all(sample["reference"].startswith("answer: ") and sample["verdict"] is None for sample in samples)


def test_a_preference_stage_has_all_figures(evaluated, models):
    metrics, output = evaluated(models[0], models[1], mode="implicit_reward")
    assert set(metrics) == PERPLEXITY | TASKS | RESPONSES | LATE | JUDGE | {"preference/accuracy", "kl/reference"}
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["late_loss/gain"] == pytest.approx(metrics["late_loss/short"] - metrics["late_loss/full"])
    assert metrics["kl/reference"] > 1  # nats; the two have nothing in common
    assert metrics["judge/both_wrong"] == 1
    samples = json.loads((output / "samples.json").read_text())
    assert {sample["verdict"] for sample in samples} == {"both wrong"}
    assert all(sample["response"] != sample["starts_from"] for sample in samples)


def test_a_model_against_itself(evaluated, models):
    metrics, output = evaluated(models[0], models[0], mode="implicit_reward")
    assert metrics["preference/accuracy"] == 0.5
    assert metrics["kl/reference"] == 0.0
    assert "judge/win_rate" not in metrics  # nobody wins
    samples = json.loads((output / "samples.json").read_text())
    assert all(sample["response"] == sample["starts_from"] for sample in samples)


def test_implicit_rewards_and_likelihoods_per_token(evaluated, models, held_out, tokenizer):
    store = TokenStore.open(held_out / "sources" / "pairs" / "preferences" / "validation")
    rows = [store.row(row).segments for row in range(SIZES.preference_pairs)]
    prompts, responses = [row[0] for row in rows], [row[1:] for row in rows]
    with torch.inference_mode():
        policy, reference = (
            response_logps(build_model(seed, tokenizer), prompts, responses, 10_000).numpy() for seed in (0, 1)
        )
    lengths = np.array([[len(response) for response in two] for two in responses])
    for mode, scores in (("implicit_reward", policy - reference), ("likelihood", policy / lengths)):
        metrics, _ = evaluated(models[0], models[1], mode=mode, full_context=1000)
        assert metrics["preference/accuracy"] == pytest.approx((scores[:, 0] > scores[:, 1]).mean())
        assert ("kl/reference" in metrics) == (mode == "implicit_reward")


def test_evaluating_twice_gives_the_same(evaluated, models):
    assert evaluated(models[1], models[0])[0] == evaluated(models[1], models[0])[0]


def test_half_precision_changes_figures_a_little(evaluated, models):
    single, _ = evaluated(models[0], models[1], mode="implicit_reward")
    half, _ = evaluated(models[0], models[1], mode="implicit_reward", precision="bf16")
    assert set(single) == set(half)
    for name in (*PERPLEXITY, "late_loss/full"):  # not what is drawn: one other token changes all that follow
        assert half[name] == pytest.approx(single[name], rel=0.05)
        assert half[name] != single[name]


def test_no_held_out_document_is_long_enough(evaluated, models):
    metrics, output = evaluated(models[0], full_context=5000)
    assert not LATE & set(metrics)
    assert not (output / "loss_by_position.json").exists()


def test_last_weights_are_measured_beside_their_average(evaluated, models, tmp_path):
    shutil.copytree(models[0] / "model", tmp_path / "model")
    shutil.copytree(models[1] / "model", tmp_path / "last")
    both, _ = evaluated(tmp_path)
    one, _ = evaluated(models[0])
    other, _ = evaluated(models[1])
    for name in ("perplexity/prose", "perplexity/lists"):
        assert both[name] == one[name]
        assert both[f"last/{name}"] == other[name] != one[name]
    assert not any(name.startswith("last/") for name in one)


def test_implicit_rewards_need_a_predecessor(evaluated, models):
    with pytest.raises(UserError, match="started from"):
        evaluated(models[0], mode="implicit_reward")


def test_a_model_with_another_tokenizer_is_refused(evaluated, models, tokenizer, tmp_path):
    build_model(0, tokenizer).save_pretrained(tmp_path)
    other = Tokenizer(tokenizer.backend, tokenizer.chat_template + "\n", tokenizer.settings)
    other.save(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer of the data \(sha .*\) is not that of the model"):
        evaluated(models[0], starts_from=tmp_path)
