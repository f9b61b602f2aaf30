"""Which attention kernel a model computes with: chosen before its first batch, and said once in a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_llm.models.attention import Request, capability, explain
from lightning_llm.models.transformer import Transformer

if TYPE_CHECKING:
    from lightning_llm.stages.config import ComputeConfig


def use_attention(model: Transformer, compute: ComputeConfig, *, precision: str, needs_gradient: bool) -> str:
    """Give the model the backend of `compute.attention`; the line that says what that means for each kind of layer.

    Args:
        precision: of the products, fp32 or bf16.
        needs_gradient: whether it is to be trained.

    Raises:
        UserError: the backend cannot do what the model asks, or is installed and broken.
    """
    device = torch.device("cuda" if compute.accelerator == "gpu" else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    asked = dict.fromkeys(map(model.config.layer_attention, range(model.config.num_hidden_layers)))
    requests = [
        Request(
            device.type, dtype, model.config.head_size, kind.window, kind.softcap, needs_gradient, capability(device)
        )
        for kind in asked
    ]
    model.attention_backend = compute.attention
    return explain(model.attention_backend, requests)
