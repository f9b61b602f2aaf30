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
