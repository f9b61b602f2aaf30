"""How large a model is and what a token costs, from its config alone: no torch, no weights."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_llm.models.config import ModelConfig

Lengths = Iterable[tuple[int, int]]  # of segments: tokens of its own, tokens of the prefix that it sees


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Exact numbers of parameters.

    Returns:
        total: all of them.
        embedding: those of the embedding and, where it is not tied to it, of the output head.
        active: those that one token meets: all but the experts it is not routed to.
        matrices: those in matrices of the layers, all experts included.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    tables = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    biases = _qkv_size(config) if config.attention_bias else 0
    norms = (4 if config.post_norms else 2) * width + (2 * config.head_size if config.qk_norm else 0)
    rest = tables + layers * (biases + norms) + width
    return {
        "total": rest + _products(config, config.num_experts),
        "embedding": tables,
        "active": rest + _products(config, config.num_experts_per_tok),
        "matrices": _products(config, config.num_experts),
    }


def forward_flops(config: ModelConfig, segments: Lengths) -> float:
    """2 N for each token and 4 d_attn for each pair of a query and a key that it sees in a layer.

    N counts the weights in matrix products, the output head included, the embedding's look-up not. A multiplication and
    an addition are two FLOPs. Pairs that causality or a window hides are not counted.
    """
    segments = list(segments)
    tokens = sum(length for length, _ in segments)
    windows = [config.layer_attention(layer).window for layer in range(config.num_hidden_layers)]
    pairs = sum(
        windows.count(window) * sum(attended_pairs(length, prefix, window) for length, prefix in segments)
        for window in set(windows)
    )  # of all layers
    head = config.vocab_size * config.hidden_size
    weights = head + _products(config, config.num_experts_per_tok)
    return 2.0 * weights * tokens + 4.0 * config.num_attention_heads * config.head_size * pairs


def attended_pairs(length: int, prefix: int = 0, window: int | None = None) -> int:
    """Pairs of query and key in a segment of `length` tokens that also sees a prefix, in one layer and head."""
    return _pairs_before(prefix + length, window) - _pairs_before(prefix, window)


def _pairs_before(length: int, window: int | None) -> int:
    """Of the first `length` queries: the query at position p sees p + 1 keys, or a window's."""
    growing = length if window is None else min(length, window)
    return growing * (growing + 1) // 2 + (length - growing) * growing


def forward_flops_per_token(config: ModelConfig, context: int) -> float:
    """Of a token in a segment of `context` tokens, averaged over its positions.

    2 N + 4 L d_attn K, where K is (T + 1) / 2, in layers with a window w < T only w - w (w - 1) / (2 T).
    """
    return forward_flops(config, [(context, 0)]) / context


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """Forward and backward, three times the forward pass: 6 N + 12 L d_attn K."""
    return 3 * forward_flops_per_token(config, context)


def recomputed_flops_per_token(config: ModelConfig, context: int) -> float:
    """Of layers that run once more in the backward pass (activation checkpointing).

    The forward pass without the head and without a layer's last product, where no norm behind it wants to know its
    result. The device computes them, the model does not need them: utilisation counts a step's `training_flops` alone.
    """
    unneeded = config.vocab_size * config.hidden_size
    if not config.post_norms:
        dense = sum(not config.has_experts(layer) for layer in range(config.num_hidden_layers))
        unneeded += dense * config.intermediate_size * config.hidden_size
    return forward_flops_per_token(config, context) - 2.0 * unneeded


def training_flops(config: ModelConfig, segments: Lengths) -> float:
    """Forward and backward, three times the forward pass."""
    return 3 * forward_flops(config, segments)


def _products(config: ModelConfig, experts: int) -> int:
    """Weights of all layers that a matrix product uses, with this many routed experts."""
    width, layers = config.hidden_size, config.num_hidden_layers
    attention = width * (_qkv_size(config) + config.num_attention_heads * config.head_size)
    router = width * config.num_experts + width  # and the gate of the shared expert
    inner = experts * config.moe_intermediate_size + config.shared_expert_intermediate_size
    mixtures = sum(config.has_experts(layer) for layer in range(layers))
    dense = 3 * width * config.intermediate_size
    return layers * attention + mixtures * (router + 3 * width * inner) + (layers - mixtures) * dense


def _qkv_size(config: ModelConfig) -> int:
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_size
