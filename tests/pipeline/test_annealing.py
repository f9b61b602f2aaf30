"""Annealing in a recipe: its length and context at every scale, what it is compared with, and a real run."""

from __future__ import annotations

import functools
import json
import math

import pytest
from safetensors.torch import load_file

from lightning_llm import compose, plan, run
from lightning_llm.pipeline.key import node_keys
from lightning_llm.settings import UserError

ANNEAL = ["+stage@stages.anneal=anneal", "stages.anneal.starts_from=long_context"]


@functools.cache
def nodes_of(recipe, *words, scale="nano"):
    return {node.name: node for node in plan(compose(recipe, scale, words)).nodes}


def test_it_keeps_the_context_and_costs_the_stages_before_nothing():
    plain, nodes = nodes_of("qwen2"), nodes_of("qwen2", *ANNEAL)
    settings = nodes["anneal"].settings
    assert settings.context == [{"at": 0, "value": 1024}]
    assert (settings.tokens, settings.lr.final, settings.lr.warmup_tokens) == (200_000, 0, 0)
    assert settings.averaging.method == "polyak"
    for name in ("tokenizer", "pretrain", "long_context", "sft", "dpo"):
        assert nodes[name].settings == plain[name].settings, name
    paper = nodes_of("qwen2", *ANNEAL, "compute=ddp", scale="paper")["anneal"].settings
    assert (paper.tokens, paper.context[0]["value"], paper.lr.peak) == (40e9, 32_768, 3e-5)


def test_a_context_of_the_users_own_is_kept_too():
    given = nodes_of("qwen2", *ANNEAL, "stages.long_context.context=[{at: 0, value: 128}, {at: 1e5, value: 300}]")
    assert given["anneal"].settings.context == [{"at": 0, "value": 300}]
    merged = [
        "+stage@stages.mean=merge",
        "stages.mean.models=[pretrain,long_context]",
        "stages.anneal.starts_from=mean",
    ]
    assert nodes_of("qwen2", *ANNEAL, *merged)["anneal"].settings.context == [{"at": 0, "value": 128}]
    assert nodes_of("qwen2", *ANNEAL, "stages.anneal.context=64")["anneal"].settings.context == [{"at": 0, "value": 64}]


def test_several_lengths_of_one_phase_keep_their_ratio():
    more = ["+stage@stages.more=anneal", "stages.more.starts_from=anneal", "stages.more.tokens=10e9"]
    nodes = nodes_of("qwen2", *ANNEAL, *more)
    assert nodes["more"].settings.tokens == 10e9  # the user's own word
    more[-1] = "scale.phases.anneal.tokens=50_000"
    nodes = nodes_of("qwen2", *ANNEAL, *more)
    assert [nodes[name].settings.tokens for name in ("anneal", "more")] == [50_000, 50_000]


def test_what_is_judged_and_what_it_is_compared_with_differ_in_their_data_alone():
    nodes = nodes_of("judge_data")
    one, other = nodes["default"].settings, nodes["candidate"].settings
    names = {f for f in vars(one) if getattr(one, f) != getattr(other, f)}
    assert names == {"data"}
    shares = {name: source.weight for name, source in other.data.sources.items()}
    assert shares.pop("candidate") == pytest.approx(0.3 * sum(shares.values()) / 0.7)
    for name, share in shares.items():
        assert share == pytest.approx(0.7 * one.data.sources[name].weight), name
    assert one.data.sources.keys() == shares.keys() == nodes["half"].settings.data.sources.keys()
    assert nodes["default"].inputs["starts_from"] == nodes["candidate"].inputs["starts_from"] == "half"


@pytest.mark.parametrize(
    ("words", "scale"),
    [
        ([], "nano"),
        (["model=llama3_1_405b"], "nano"),
        (["model=llama3_1_70b", "compute=ddp"], "paper"),
        (["stages.half.lr.peak=0.001"], "nano"),
        (["stages.half.lr.warmup_share=0"], "nano"),
        (["stages.half.lr.stretch=1"], "nano"),
    ],
)
def test_judging_goes_on_at_the_rate_that_the_half_trained_model_has_come_to(words, scale):
    nodes = nodes_of("judge_data", *words, scale=scale)
    half = nodes["half"].settings
    lr, whole = half.lr, half.tokens * half.lr.stretch
    gone = (half.tokens - lr.warmup_tokens) / (whole - lr.warmup_tokens)
    at_the_end = lr.peak * (0.01 + 0.99 * (1 + math.cos(math.pi * gone)) / 2)
    for name in ("default", "candidate"):
        peak = nodes[name].settings.lr.peak
        assert peak == pytest.approx(at_the_end)
        assert nodes["half"].figures["lr"]["final"] == nodes[name].figures["lr"]["peak"] == peak  # as the plan shows it
    assert (peak / lr.peak == pytest.approx(0.505)) == ("stages.half.lr.warmup_share=0" in words)


def test_a_peak_of_the_users_own_is_kept():
    nodes = nodes_of("judge_data", "stages.candidate.lr.peak=0.25")
    assert nodes["candidate"].settings.lr.peak == 0.25
    assert nodes["default"].settings.lr.peak < 0.01


def test_another_candidate_leaves_the_half_trained_model_as_it_was(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"text": "one two three"}\n')

    def keys(*words):
        nodes = nodes_of("judge_data", *words)
        return node_keys(list(nodes.values()), lambda source, where: source.path)

    first, other = keys(), keys(f"stages.candidate.data.sources.candidate.path={tmp_path}/mine.jsonl")
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {"candidate.prepare", "candidate", "candidate.evaluate"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stages.pretrain.context=null"], "stages.pretrain.context: has no value"),
        ([*ANNEAL, "stages.anneal.lr.stretch=0.5"], "stretch: must be at least 1"),
        ([*ANNEAL, "stages.anneal.phase=aneal"], "stages.anneal.phase: 'aneal' .* anneal"),
        (["+stage@stages.anneal=anneal"], "stages.anneal.context: has no value"),
        (["stages.pretrain.lr.peak=null"], "stages.pretrain.lr.peak: has no value, .* random weights"),
        ([*ANNEAL, "stages.anneal.lr.final_share=-1"], r"stages.anneal.lr.final_share: is -1\. It must be at least 0"),
        ([*ANNEAL, "stages.anneal.lr.peak=null"], "stages.anneal.lr.peak: .* long_context has ended at 0"),
    ],
)
def test_a_mistake_is_one_line(words, says):
    with pytest.raises(UserError, match=says):
        plan(compose("qwen2", overrides=[*words, "stages.long_context.lr.final=0"]))


def test_a_model_of_elsewhere_has_no_context_to_keep(talker):
    words = ["+stage@stages.anneal=anneal", f"stages.anneal.starts_from={talker}"]
    with pytest.raises(UserError, match=r"stages\.anneal\.context: has no value, and no stage has trained"):
        compose("qwen2", overrides=words)


@pytest.mark.slow
def test_a_real_run_anneals_and_measures_average_and_last(beside, tmp_path):
    words = [*beside(tmp_path), *ANNEAL, "scale.phases.anneal.tokens=20_000"]
    record = run(compose("qwen2", overrides=words), until="anneal")
    made = {name for name, stage in record.stages.items() if not stage["reused"]}
    assert made - {"anneal.prepare"} == {"anneal", "anneal.evaluate"}
    metrics = record.stages["anneal"]["metrics"]
    assert {"averaged/loss", "validation/loss", "last/perplexity/web", "perplexity/web"} <= metrics.keys()
    assert metrics["perplexity/web"] != metrics["last/perplexity/web"]
    folder = record.artifact("anneal")
    names = load_file(folder / "model" / "model.safetensors").keys()
    assert names == load_file(folder / "last" / "model.safetensors").keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 * rates[0]  # 0 in the last step, if anything counts in it
