"""Code that a model says, judged by tests in its row: sampled, judged and selected by a recipe."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_llm import compose, run
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.stages.samples import read_rows

RECIPE = """# @package _global_
defaults:
  - /model: qwen2_7b
  - /stage@stages.sft: sft
  - /stage@stages.sample: sample
  - /stage@stages.score: score
  - /stage@stages.best: select
  - _self_
stages:
  sft:
    {starts_from: ONES, examples: 40, context: 128, batch_tokens: 500, evaluate: false,
     data: {sources: {instructions: {path: "embedded:instructions", options: {rows: 60}}}}}
  sample: {models: [ONES], per_prompt: 8, max_new_tokens: 8, data: {sources: {questions: {path: prompts.jsonl}}}}
  score: {data: [sample]}
  best: {data: [score], minimum_score: 0.5}
"""
ROWS = [  # the first accepts all code that runs, the others what a model of this size does not write
    {"prompt": "write anything", "tests": "pass"},
    {"prompt": "write double(x)", "tests": "assert double(4) == 8\nassert double(-1) == -2"},
    {"prompt": "write largest(numbers)", "tests": "assert largest([3, 9, 4]) == 9"},
]


@pytest.fixture
def ones(talker, tmp_path):
    """A model that ends its turn or says 1, both as likely as not, whatever it is asked: code that runs."""
    tokenizer = Tokenizer.load(talker)
    model = Transformer(
        ModelConfig(
            name="ones",
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            max_position_embeddings=256,
        )
    )
    [one] = tokenizer.encode("1")
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # layers add nothing to a stream that is 1 everywhere
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        for said in (one, tokenizer.end_of_turn_id):
            model.head_weight[said] = 1.0  # a logit of 32, and 0 of all others
    model.save_pretrained(tmp_path / "ones", eos_token_ids=[tokenizer.end_of_turn_id, tokenizer.eos_id])
    tokenizer.save(tmp_path / "ones")
    return tmp_path / "ones"


def test_rows_with_tests_go_from_samples_to_a_selection(ones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(RECIPE.replace("ONES", str(ones)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    words = ["judge@stages.score.judge=unit_tests", "stages.score.judge.seconds=30", "compute.threads=1"]
    words += [f"scale.corpora.{name}.path=null" for name in ("web", "docs", "math")]
    words += ["scale.corpora.code.max_rows=10", "stages.sample.per_prompt=8", "stages.sample.max_new_tokens=8"]
    record = run(compose("mine", overrides=words, config_dir=tmp_path), until="best")

    samples = list(read_rows(record.artifact("sample") / "samples.jsonl"))
    verdicts = list(read_rows(record.artifact("score") / "verdicts.jsonl"))
    scores = {
        sample["prompt"][0]["content"]: [verdict["score"] for verdict in found["verdicts"]]
        for sample, found in zip(samples, verdicts, strict=True)
    }
    assert scores == {row["prompt"]: [float(row["tests"] == "pass")] * 8 for row in ROWS}
    [row] = read_rows(record.artifact("best") / "rows.jsonl")
    asked, said = (message["content"] for message in row["messages"])
    assert asked == "write anything"
    assert set(said) == {"1"}
