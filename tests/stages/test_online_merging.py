"""A stage whose steps are merged: in Lightning's loop, with clipping, on one process and on two."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lightning_llm.models import Transformer
from lightning_llm.optimization.config import AdamWConfig, OnlineMergingConfig
from lightning_llm.settings import UserError
from lightning_llm.stages import train
from lightning_llm.stages.config import ComputeConfig


@pytest.fixture(scope="module")
def line(settings, prepared, tokenizer_artifact, context_of):
    """Artifacts of a base and of the SFT model that started from it."""
    base = context_of(settings(tokens=3000), {"data": prepared["text"], "tokenizer": tokenizer_artifact})
    train.run(base)
    data = {"data": prepared["conversations"], "tokenizer": tokenizer_artifact}
    sft = context_of(settings("conversations", tokens=3000), {"starts_from": base.output, **data})
    train.run(sft)
    return base.output, sft.output


@pytest.fixture(scope="module")
def merged_stage(line, settings, prepared, tokenizer_artifact, context_of):
    """`merged_stage(merging, devices)` -> weights that a further SFT of three steps leaves."""
    base, sft = line
    inputs = {"starts_from": sft, "data": prepared["conversations"], "tokenizer": tokenizer_artifact}
    inputs |= {"merging_base": base, "merging_reference": sft}

    def make(merging, devices=1):
        compute = ComputeConfig(devices=devices, strategy="single" if devices == 1 else "ddp", micro_batch_tokens=256)
        optimizer = AdamWConfig(eps=1e-5, clip_norm=0.1, online_merging=merging)
        batch = [{"at": 0, "value": 600}]
        chosen = settings("conversations", tokens=1800, optimizer=optimizer, batch_tokens=batch)
        context = context_of(chosen, inputs, compute=compute)
        result = train.run(context)
        assert result.metrics["grad_norm"] > 0.1  # it is clipped
        return load_file(context.output / "model" / "model.safetensors")

    return make


def plain(line):
    return [load_file(folder / "model" / "model.safetensors") for folder in line]


def test_alpha_pulls_towards_what_the_reference_has_learnt(line, merged_stage):
    """Nothing dropped: three steps with weight a end three pulls away from those without."""
    base, sft = plain(line)
    alpha = 1e-3
    free = merged_stage(OnlineMergingConfig(method="ondare", reserve_rate=1.0, alpha=0.0))
    pulled = merged_stage(OnlineMergingConfig(method="ondare", reserve_rate=1.0, alpha=alpha))
    for name in free:
        tau, moved = sft[name] - base[name], free[name] - sft[name]
        expected = free[name] + 3 * alpha * tau - alpha * moved  # to first order in a
        size = float((pulled[name] - free[name]).norm())
        assert float((pulled[name] - expected).norm()) < 0.3 * size, name  # gradients elsewhere are others


def test_a_gap_of_one_stage_is_one_merge_at_its_end(line, merged_stage):
    """Algorithm 2 with K = all steps: the trained model merged once, as if offline."""
    base, sft = plain(line)
    alone = merged_stage(OnlineMergingConfig())
    merging = OnlineMergingConfig(method="ondare", reserve_rate=1.0, alpha=0.2, gap_steps=3)
    for name, weights in merged_stage(merging).items():
        # decay stays outside of the merge: some lr * 0.1 of a weight
        expected = sft[name] + 0.8 * (alone[name] - sft[name]) + 0.2 * (sft[name] - base[name])
        torch.testing.assert_close(weights, expected, rtol=0, atol=2e-3 * float(sft[name].abs().max()))


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["ondare", "onties"])
def test_two_processes_drop_the_same(method, merged_stage):
    merging = OnlineMergingConfig(method=method, reserve_rate=0.3, alpha=0.01, gap_steps=2)
    one, two = merged_stage(merging), merged_stage(merging, devices=2)
    for name in one:
        # entries at the threshold may change sides where sums are rounded otherwise: few of them
        far = np.abs((one[name] - two[name]).numpy()) > 1e-5
        assert far.mean() < (0.001 if method == "ondare" else 0.02), name


def test_a_base_of_another_shape_is_refused(line, merged_stage, settings, prepared, tokenizer_artifact, context_of):
    _, sft = line
    model = Transformer.from_pretrained(sft / "model")
    other = Transformer(dataclasses.replace(model.config, intermediate_size=48))
    other.reset_parameters(0)
    folder = context_of(None).output
    other.save_pretrained(folder)
    inputs = {"starts_from": sft, "data": prepared["conversations"], "tokenizer": tokenizer_artifact}
    inputs |= {"merging_base": folder, "merging_reference": sft}
    optimizer = AdamWConfig(online_merging=OnlineMergingConfig(method="ondare"))
    with pytest.raises(UserError, match=r"optimizer.online_merging.base: .* is a model of another shape"):
        train.run(context_of(settings("conversations", optimizer=optimizer), inputs))
