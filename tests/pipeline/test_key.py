"""Keys: what moves them, what does not, and that they stay what they were."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm import compose, plan
from lightning_llm.data.config import DataConfig, SourceConfig, TokenizerConfig
from lightning_llm.evaluation.config import EvaluationConfig, ExactAnswerConfig
from lightning_llm.generation.config import SamplingConfig
from lightning_llm.models.config import ModelConfig
from lightning_llm.objectives.config import CausalLMConfig, DPOConfig, IPOConfig
from lightning_llm.optimization.config import AdamWConfig, LearningRateConfig
from lightning_llm.pipeline.expand import Node
from lightning_llm.pipeline.key import canonical, digest, node_keys
from lightning_llm.pipeline.scaling import scaled
from lightning_llm.settings import came_later
from lightning_llm.stages.config import (
    EvaluateSettings,
    GenerateSettings,
    JudgeSettings,
    PrepareSettings,
    ScoreSettings,
    SelectSettings,
    TokenizerSettings,
    TrainSettings,
)

GOLDEN = Path(__file__).parent / "golden_keys.json"


def constant(source, where):
    """A fingerprint that no version of a package moves."""
    return f"content of {source.path}"


def keys_of(recipe) -> dict[str, str]:
    return node_keys(plan(recipe).nodes, constant)


@pytest.fixture(scope="module")
def recipe():
    return compose("qwen2")


def changed(recipe, stage: str, **changes):
    return replace(recipe, stages=recipe.stages | {stage: replace(recipe.stages[stage], **changes)})


def moved(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def fixed_nodes() -> list[Node]:
    """A node of every verb, with settings that no file in conf/ decides."""
    rows = DataConfig(name="pairs", form="pairs", sources={"mine": SourceConfig(path="mine.jsonl")})
    lr = LearningRateConfig(schedule="linear", peak=1e-3, final=0.0, warmup_tokens=100.0)
    ramp = [{"at": 0, "value": 256}]
    settings = TrainSettings(
        ModelConfig(name="m"), DPOConfig(), AdamWConfig(), rows, lr, 5000, ramp, ramp, None, "fp32", 0
    )
    return [
        Node(
            "tokenizer",
            "prepare",
            TokenizerSettings(TokenizerConfig(sources={"mine": SourceConfig(path="mine.jsonl")}), "train", 0),
        ),
        Node("x.prepare", "prepare", PrepareSettings(rows, [256], ["train"], 0), {"tokenizer": "tokenizer"}),
        Node("base", "train", replace(settings, objective=CausalLMConfig()), {"data": "x.prepare"}),
        Node("x.reference", "score", ScoreSettings(256, ["train"], "fp32"), {"model": "base", "data": "x.prepare"}),
        Node("x", "train", settings, {"starts_from": "base", "data": "x.prepare", "reference": "x.reference"}),
        Node("ipo", "train", replace(settings, objective=IPOConfig()), {"data": "x.prepare"}),
        Node("x.evaluate", "evaluate", EvaluateSettings(EvaluationConfig(), 128, 256, "likelihood", "fp32", 0)),
        Node(
            "sample",
            "generate",
            GenerateSettings(["base", "x"], {"mine": 1.0}, 100, 0, 4, 32, SamplingConfig(), "fp32", 0),
            {"model.0": "base", "model.1": "x", "data": "x.prepare", "tokenizer": "tokenizer"},
        ),
        Node("judged", "judge", JudgeSettings(ExactAnswerConfig(), "fp32", 0), {"samples.0": "sample"}),
        Node(
            "best",
            "select",
            SelectSettings("best", "conversations", 0.5, 1, 1.0, "none", 0.5, 4, 0),
            {"samples.0.0": "sample", "verdicts.0": "judged"},
        ),
    ]


def test_keys_are_those_that_were():
    """What is in people's stores stays theirs: a new field of settings says which value means 'as before'. A key that
    moves on purpose (CONTRACTS) is renewed in the file, and the changelog says so."""
    assert node_keys(fixed_nodes(), constant) == json.loads(GOLDEN.read_text())


def test_a_stage_moves_what_depends_on_it_and_nothing_else(recipe):
    before = keys_of(recipe)
    objective = replace(recipe.stages["dpo"].objective, beta=0.05)
    behind = {"dpo", "dpo.evaluate", "online_dpo", "online_dpo.evaluate"}
    assert moved(before, keys_of(changed(recipe, "dpo", objective=objective))) == behind
    after = keys_of(changed(recipe, "sft", rope_theta=5.0))
    judging = {"reward_model", "reward_model.evaluate"}
    assert moved(before, after) == {"sft", "sft.evaluate", "dpo.reference", *behind, *judging}


def test_a_stage_that_is_added_moves_no_other(recipe):
    before = keys_of(compose("qwen2", overrides=["stages.reward_model=null", "stages.online_dpo=null"]))
    assert "reward_model" not in before
    assert not moved(before, keys_of(recipe))


def test_a_seed_moves_all_training_and_no_data(recipe):
    names = moved(keys_of(recipe), keys_of(replace(recipe, seed=1)))
    assert {"pretrain", "dpo", "dpo.evaluate"} <= names
    assert not {name for name in names if name.endswith("prepare") or name == "tokenizer"}


def test_what_decides_nothing_is_not_in_a_key(recipe):
    before = keys_of(recipe)
    compute = replace(recipe.compute, devices=2, strategy="ddp", attention="sdpa", threads=1, micro_batch_tokens=7)
    assert keys_of(replace(recipe, compute=compute)) == before
    assert keys_of(changed(recipe, "sft", evaluate_every=77.0)) == before
    precise = replace(recipe, compute=replace(recipe.compute, precision="bf16"))
    assert "pretrain" in moved(before, keys_of(precise))


def test_data_moves_a_key(recipe):
    nodes = plan(recipe).nodes
    before = node_keys(nodes, constant)
    after = node_keys(nodes, lambda source, where: "other" if source.path == "embedded:instructions" else "")
    assert "sft.prepare" in moved(before, after)
    weights = {name: replace(source, weight=0.5) for name, source in recipe.stages["sft"].data.sources.items()}
    reweighted = changed(recipe, "sft", data=replace(recipe.stages["sft"].data, sources=weights))
    names = moved(before, keys_of(reweighted))
    assert "sft" in names
    assert "sft.prepare" not in names  # the rows are the same


def test_stages_that_share_rows_share_their_tokens(recipe):
    keys = keys_of(recipe)
    assert keys["pretrain.prepare"] == keys["long_context.prepare"]


def test_rows_of_a_stage_count_by_its_key_and_not_by_its_name():
    def keys(name: str, seed: int = 0) -> tuple[str, str]:
        best = Node(name, "select", SelectSettings("first", "conversations", None, 1, 1.0, "none", 0.5, 4, seed))
        rows = DataConfig(name="rows", form="conversations", sources={"own": SourceConfig(path=f"stage:{name}")})
        inputs = {"source.own": name}
        found = node_keys([best, Node("y.prepare", "prepare", PrepareSettings(rows, [64], ["train"], 0), inputs)])
        return found[name], found["y.prepare"]

    assert keys("best") == keys("post3.best")
    assert keys("best", seed=1)[1] != keys("best")[1]


@dataclass
class Old:
    size: int = 3


@dataclass
class New:
    size: int = 3
    added: float = came_later(0.0)
    listed: list[str] = came_later(["one"])


def test_a_field_that_came_later_stays_out_while_it_is_as_before():
    assert digest(canonical(New())) == digest(canonical(Old()))
    assert digest(canonical(New(added=0))) == digest(canonical(Old()))
    assert digest(canonical(New(added=0.1))) != digest(canonical(Old()))
    assert digest(canonical(New(listed=["one", "two"]))) != digest(canonical(Old()))
    assert New().listed is not New().listed


@given(st.integers(-(2**53) + 1, 2**53 - 1))
def test_one_and_one_point_zero_are_one_number(number):
    assert digest(canonical({"x": [number]})) == digest(canonical({"x": (float(number),)}))


def test_a_model_of_elsewhere_is_known_by_its_files(recipe, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        config = {"model_type": "qwen2", "vocab_size": 600, "hidden_size": 8, "intermediate_size": 8}
        config |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")

    def key(folder: str) -> str:
        return keys_of(scaled(changed(recipe, "sft", starts_from=str(tmp_path / folder))))["sft"]

    first = key("here")
    assert key("there") == first  # wherever they lie
    (tmp_path / "there" / "model.safetensors").write_bytes(b"others")
    assert key("there") != first
