"""Which attention kernel a model computes with: chosen before anything runs, and said once in a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_llm.models.attention import Request, capability, explain
from lightning_llm.models.config import ModelConfig
from lightning_llm.models.transformer import Transformer

if TYPE_CHECKING:
    from lightning_llm.stages.config import ComputeConfig


def use_attention(model: Transformer, compute: ComputeConfig, *, precision: str, needs_gradient: bool) -> str:
    """Give the model the backend of `compute.attention`; what `attention_line` says of it, with the same arguments."""
    line = attention_line(model.config, compute, precision=precision, needs_gradient=needs_gradient)
    model.attention_backend = compute.attention
    return line


def attention_line(config: ModelConfig, compute: ComputeConfig, *, precision: str, needs_gradient: bool) -> str:
    """What `compute.attention` means for each kind of layer of a model of that shape. Needs no weights.

    Args:
        precision: of the products, fp32 or bf16.
        needs_gradient: whether it is to be trained.

    Raises:
        UserError: the backend cannot do what the model asks, or is installed and broken.
    """
    device = torch.device("cuda" if compute.accelerator == "gpu" else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    asked = dict.fromkeys(map(config.layer_attention, range(config.num_hidden_layers)))
    requests = [
        Request(device.type, dtype, config.head_size, kind.window, kind.softcap, needs_gradient, capability(device))
        for kind in asked
    ]
    return explain(compute.attention, requests)
