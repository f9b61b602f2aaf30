"""The feed-forward half of a layer: gated linear units (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from lightning_llm.models.config import ModelConfig

FUNCTIONS = {"silu": silu, "gelu_pytorch_tanh": partial(gelu, approximate="tanh")}  # of config.ACTIVATIONS, each


class FeedForward(nn.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, config: ModelConfig, size: int | None = None):
        """
        Args:
            size: of the inner vectors; none: `config.intermediate_size`.
        """
        super().__init__()
        size = config.intermediate_size if size is None else size
        self.act = FUNCTIONS[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., d] of hidden states [.., d]."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
