"""The feed-forward half of a layer: SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from lightning_llm.models.config import ModelConfig
from lightning_llm.settings import UserError


class FeedForward(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.hidden_act != "silu":
            raise UserError("model.hidden_act", f"{config.hidden_act!r} is not built yet", "Use silu")
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
