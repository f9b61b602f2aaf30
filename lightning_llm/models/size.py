"""How large a model is and what a token costs, from its config alone: no torch, no weights."""

from __future__ import annotations

from lightning_llm.models.config import ModelConfig


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Exact numbers of parameters.

    Returns:
        total: all of them.
        embedding: those of the embedding and, where it is not tied to it, of the output head.
        active: those that one token meets: all but the experts it is not routed to.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    tables = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    biases = _qkv_size(config) if config.attention_bias else 0
    norms = 2 * width
    rest = tables + layers * (biases + norms) + width
    return {
        "total": rest + layers * _products_per_layer(config, config.num_experts),
        "embedding": tables,
        "active": rest + layers * _products_per_layer(config, config.num_experts_per_tok),
    }


def forward_flops(config: ModelConfig, tokens: float, attended: float) -> float:
    """2 N for each token and 4 L d_attn for each pair of a query and a key that it sees.

    N counts the weights in matrix products, the output head included, the embedding's look-up not. A multiplication and
    an addition are two FLOPs.

    Args:
        attended: pairs of query and key in one layer and head, without the upper triangle (`attended_pairs`).
    """
    head = config.vocab_size * config.hidden_size
    weights = head + config.num_hidden_layers * _products_per_layer(config, config.num_experts_per_tok)
    attention_width = config.num_attention_heads * config.head_size
    return 2.0 * weights * tokens + 4.0 * config.num_hidden_layers * attention_width * attended


def attended_pairs(length: int, prefix: int = 0) -> int:
    """Pairs of query and key in a segment of `length` tokens that also sees a prefix."""
    return length * (length + 1) // 2 + length * prefix


def forward_flops_per_token(config: ModelConfig, context: int) -> float:
    """2 N + 4 L d_attn (T + 1) / 2 of a token in a segment of `context` tokens, averaged over its positions."""
    return forward_flops(config, 1, (context + 1) / 2)


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """Forward and backward: 6 N + 12 L d_attn (T + 1) / 2, three times the forward pass."""
    return 3 * forward_flops_per_token(config, context)


def training_flops(config: ModelConfig, tokens: float, attended: float) -> float:
    """Forward and backward, three times the forward pass."""
    return 3 * forward_flops(config, tokens, attended)


def _products_per_layer(config: ModelConfig, experts: int) -> int:
    """Weights of one layer that a matrix product uses, with this many routed experts."""
    width = config.hidden_size
    attention = width * (_qkv_size(config) + config.num_attention_heads * config.head_size)
    if not config.num_experts:
        return attention + 3 * width * config.intermediate_size
    router = width * config.num_experts + width  # and the gate of the shared expert
    return (
        attention
        + router
        + 3 * width * (experts * config.moe_intermediate_size + config.shared_expert_intermediate_size)
    )


def _qkv_size(config: ModelConfig) -> int:
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_size
