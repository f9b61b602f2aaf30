"""Upcycling in a recipe: Qwen2-57B-A14B of the 7B, sizes at a scale, keys, mistakes, and a real run."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from lightning_llm import cli, compose, plan
from lightning_llm.batch import SegmentBatch
from lightning_llm.models import Transformer
from lightning_llm.models.size import parameter_counts
from lightning_llm.pipeline.key import node_keys
from lightning_llm.settings import UserError

COPIES = ["stages.upcycle.experts=copies", "stages.upcycle.norm_topk_prob=true"]
COPIES += ["stages.upcycle.moe_intermediate_size=null", "stages.upcycle.shared_expert_intermediate_size=null"]


@functools.cache
def planned(*words, scale="nano"):
    return plan(compose("upcycling", scale, overrides=words))


def test_the_report_s_mixture_comes_of_the_7b():
    found = planned("compute=ddp", scale="paper")
    nodes = {node.name: node for node in found.nodes}
    released = compose("upcycling", "paper", ["model=qwen2_57b_a14b"]).model
    mixture, there = nodes["mixture"].settings.model, parameter_counts(released)
    assert mixture.family == "qwen2_moe"
    for field in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"):
        assert getattr(mixture, field) == getattr(released, field)
    assert (mixture.norm_topk_prob, mixture.router_aux_loss_coef) == (False, 0.001)
    rows = 2 * (152_064 - 151_936) * 3584  # of embedding and head: the released 7B has more for the same tokenizer
    figures = nodes["upcycle"].figures
    assert (figures["parameters"] - rows, figures["active"] - rows) == (there["total"], there["active"])
    assert there["total"] == pytest.approx(57.41e9, rel=1e-3)
    [line] = [line for line in str(found).splitlines() if line.startswith("upcycle ")]
    assert "57.4B (14.3B active)" in line


def test_experts_are_the_scale_s_own():
    nodes = {node.name: node for node in planned().nodes}
    mixture = nodes["mixture"].settings.model
    sizes = (mixture.num_experts, mixture.num_experts_per_tok, mixture.moe_intermediate_size)
    assert (*sizes, mixture.shared_expert_intermediate_size) == (8, 2, 88, 176)
    assert nodes["mixture"].inputs["starts_from"] == "upcycle"
    assert nodes["upcycle"].inputs == {"starts_from": "pretrain"}
    copies = {node.name: node for node in planned(*COPIES, "stages.upcycle.num_experts=5").nodes}
    shape = copies["mixture"].settings.model
    assert (shape.num_experts, shape.moe_intermediate_size, shape.shared_expert_intermediate_size) == (5, 352, 352)


def test_the_key_knows_how():
    def key(*words):
        nodes = planned(*words, "scale.corpora.docs.path=null").nodes
        return node_keys(list(nodes), lambda source, where: "text")["upcycle"]

    keys = [key(), key(*COPIES), key("stages.upcycle.reinitialised=0"), key("stages.upcycle.of=units")]
    keys += [key("stages.upcycle.keeps_scale=false"), key("seed=1"), key("stages.upcycle.num_experts=4")]
    assert len(set(keys)) == len(keys)
    assert key("stages.upcycle.evaluate=false") == keys[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stages.upcycle.starts_from=null"], "stages.upcycle.starts_from: has no value"),
        (["stages.upcycle.experts=slice"], "stages.upcycle.experts: 'slice' is none. Choose slices or copies"),
        (["stages.upcycle.of=rows"], "stages.upcycle.of: 'rows' is none"),
        (["stages.upcycle.experts=copies"], "moe_intermediate_size: is 2560, and a copy is as wide"),
        (
            ["stages.upcycle.num_experts_per_tok=9"],
            r"stages.upcycle.num_experts_per_tok: must lie in \[1, num_experts\]",
        ),
        (["stages.upcycle.reinitialised=1.5"], r"reinitialised: is a share in \[0, 1\]"),
        (
            ["model=llama3_1_8b"],
            "stages.upcycle.starts_from: family of the model is llama, and mixtures of",
        ),
        (["model=qwen2_57b_a14b"], "stages.upcycle.starts_from: family of the model is qwen2_moe"),
        (["model.sliding_window=64", "model.layer_types=[sliding_attention]"], "sliding_window: is 64"),
    ],
)
def test_a_mistake_is_one_line(words, says):
    with pytest.raises(UserError, match=says) as caught:
        planned(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_by_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    """Copies are the dense model; slices are trained on."""
    monkeypatch.chdir(tmp_path)
    words = [word for word in tiny if not word.startswith(("stages.", "evaluation.preference"))]
    words += ["stages.pretrain.evaluate=false", "stages.upcycle.evaluate=false"]
    sizes = [f"stages.upcycle.{size}" for size in ("moe_intermediate_size=16", "shared_expert_intermediate_size=32")]
    assert cli.command(["run", "recipe=upcycling", *words, *sizes]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    metrics = json.loads((folder / "run.json").read_text())["stages"]["mixture"]["metrics"]
    assert 1 < metrics["perplexity/web"] < 400  # 512 before the first step
    assert metrics["router/aux_loss"] > 0
    assert cli.command(["run", "recipe=upcycling", *words, *COPIES, "until=upcycle"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    dense, copies = (Transformer.from_pretrained(folder / "artifacts" / n / "model") for n in ("pretrain", "upcycle"))
    texts = SegmentBatch.from_documents([list(range(3, 60)), [9, 8, 7]])
    with torch.no_grad():
        torch.testing.assert_close(copies.logits(copies(texts)), dense.logits(dense(texts)), rtol=1e-4, atol=1e-4)
