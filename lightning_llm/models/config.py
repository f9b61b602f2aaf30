"""The shape of a model: one dataclass whose fields are spelt as in config.json."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lightning_llm.settings import option


@dataclass(frozen=True)
class LayerAttention:
    """What one layer asks of attention beside queries, keys and values; None: nothing of the kind, the usual scale."""

    window: int | None = None  # tokens a query sees, itself included
    softcap: float | None = None  # scores are held between -softcap and softcap
    scale: float | None = None  # factor of the scores; none: 1 / sqrt(head size)


@option("model", "transformer")
@dataclass
class ModelConfig:
    """A decoder-only transformer. A family is a choice of these values, never a class of its own."""

    name: str = "???"  # the option's name, for the plan and the report
    family: str = "qwen2"  # which Hugging Face class the artifact is written as (models/families.py)
    vocab_size: int = 151_936  # rows of the embedding; may exceed the tokenizer's entries
    hidden_size: int = 3584
    intermediate_size: int = 18_944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int | None = None  # none: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    attention_bias: bool = True  # bias on the query, key and value projections (Qwen 2)
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    tokenizer: str = "train"  # "train": on the recipe's own text; else a directory or hub name with tokenizer.json
    # mixture of experts (Qwen2-57B-A14B); num_experts 0 is a dense model
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    # figures of the report that vary with the size; the recipe refers to them as ${model.published.<key>}
    published: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        """Raises ValueError, naming the field, for shapes that no transformer can have."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}) unless head_dim is given"
            )
        if self.head_size % 2:
            raise ValueError(f"the head size ({self.head_size}) must be even: rotary embeddings turn pairs of values")

    @property
    def head_size(self) -> int:
        """D: `head_dim`, or what it is by default."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    def layer_attention(self, layer: int) -> LayerAttention:
        """What layer `layer`, counted from 0, asks of attention. All that computes attention asks here."""
        return LayerAttention()


def set_rope_theta(config: ModelConfig, theta: float) -> ModelConfig:
    """The same model with another RoPE base (Qwen 2's long-context stage: 1e4 -> 1e6); everything else as it is."""
    return replace(config, rope_parameters={**config.rope_parameters, "rope_theta": float(theta)})


def set_rope_scaling(config: ModelConfig, scaling: dict[str, Any]) -> ModelConfig:
    """The same model with its RoPE stretched otherwise: `scaling` takes the place of all but the base.

    Raises:
        ValueError: a key is missing or unknown.
    """
    return replace(config, rope_parameters={"rope_theta": config.rope_parameters["rope_theta"], **scaling})
