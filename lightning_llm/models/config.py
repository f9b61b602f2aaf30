"""The shape of a model: one dataclass whose fields are spelt as in config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_llm.settings import option


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
    attention_bias: bool = False  # bias on the query, key and value projections (Qwen 2)
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
