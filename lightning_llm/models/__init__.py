"""The backbone that all families share, and its Hugging Face files."""

from typing import TYPE_CHECKING

from lightning_llm.models.config import ModelConfig, set_rope_scaling, set_rope_theta

__all__ = ["ModelConfig", "Transformer", "set_rope_scaling", "set_rope_theta"]

if TYPE_CHECKING:
    from lightning_llm.models.transformer import Transformer


def __getattr__(name: str):
    # Imported on first use: a plan reads ModelConfig and must not pay for torch.
    if name == "Transformer":
        from lightning_llm.models.transformer import Transformer

        return Transformer
    raise AttributeError(f"module 'lightning_llm.models' has no attribute {name!r}")
