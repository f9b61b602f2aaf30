"""Activation checkpointing: the same gradients to the bit, in less memory."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.objectives.config import CausalLMConfig

ROOT = Path(__file__).parents[2]


def backward(model, batch):
    (model(batch) * torch.linspace(-1, 1, 32)).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_gradients_are_the_same_to_the_bit():
    config = ModelConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Transformer(config)
    model.reset_parameters(seed=0)
    again = copy.deepcopy(model)
    again.activation_checkpointing = True
    calls = []
    for layer in again.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    batch = SegmentBatch.from_groups([[1, 2, 3, 4, 5]] * 2, [[[6, 7, 8], [9, 10]], [[11], [12, 13, 14, 15]]])
    for one, other in zip(backward(model, batch), backward(again, batch), strict=True):
        assert torch.equal(one, other)
    assert len(calls) == 6  # each layer twice
    with torch.no_grad():
        assert torch.equal(model(batch), again(batch))
    assert len(calls) == 9  # without a backward pass there is nothing to run again


def trained_loss(model, batch):
    """Of both losses, as a training step has them."""
    part = CausalLMConfig().build(model).trained_loss(batch)
    (part.loss + part.per_token).backward()
    total, tokens = part.metrics["router/aux_loss"]
    return part.loss.item(), total.item() / tokens, [parameter.grad for parameter in model.parameters()]


def test_routers_pay_once_and_leave_nothing_behind():
    config = ModelConfig(
        family="qwen2_moe", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, router_aux_loss_coef=0.5,
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=24,
        decoder_sparse_step=2,
    )  # fmt: skip
    model = Transformer(config)
    model.reset_parameters(seed=0)
    again = copy.deepcopy(model)
    again.activation_checkpointing = True
    batch = SegmentBatch.from_documents([[1, 2, 3, 4, 5] * 4, [6, 7, 8, 9, 30, 31]])
    loss, balance, gradients = trained_loss(model, batch)
    other_loss, other_balance, other_gradients = trained_loss(again, batch)
    assert (loss, balance) == (other_loss, other_balance)
    assert balance > 2  # num_experts_per_tok where all is even
    for (name, _), one, other in zip(model.named_parameters(), gradients, other_gradients, strict=True):
        assert torch.equal(one, other), name
    assert again.layers[1].mlp.gate.weight.grad.norm() > 0
    assert again.take_routed() == []  # of the second pass through a layer, with the whole of its graph
    hidden = again(batch)
    hidden.sum().backward()
    routed = again.take_routed()  # nor does that pass take the place of what the first one did
    assert [layer.tokens for layer in routed] == [26]
    assert routed[0].probability.grad_fn is not None
    assert routed[0].load.sum() == 52


PEAK = """
import sys, torch
from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
torch.set_num_threads(1)
def peak():  # KiB; not getrusage's: that of a child begins at its parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
config = ModelConfig(vocab_size=65, hidden_size=128, intermediate_size=512, num_hidden_layers=12,
                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
model = Transformer(config)
model.reset_parameters(0)
model.activation_checkpointing = sys.argv[1] == "full"
def step(documents):
    model(SegmentBatch.from_documents([list(range(1, 65))] * documents)).square().sum().backward()
step(1)
before = peak()
step(64)  # 4,096 tokens
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux's /proc")
def test_peak_memory_falls():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    peak = {
        keep: int(subprocess.run(
            [sys.executable, "-c", PEAK, keep], env=environment, capture_output=True, text=True, check=True
        ).stdout)
        for keep in ("none", "full")
    }  # fmt: skip
    # twelve layers keep some 4,100 numbers a token each, or 128 with one whole layer at a time
    assert peak["none"] > 500 * 1024  # KiB
    assert peak["full"] < peak["none"] / 3
