"""How large a model is and what a token costs, from its config alone: no torch, no weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_llm.data.config import GRADES
from lightning_llm.models.config import ModelConfig

Lengths = Iterable[tuple[int, int]]  # of segments: tokens of its own, tokens of the prefix that it sees


@dataclass(frozen=True)
class ScoreHead:
    """What a reward model has in place of the vocabulary's head (models/reward.py), read once in each segment."""

    graded: int = 0  # networks for the grades of single responses

    def weights(self, width: int) -> int:
        """Those of matrix products: the map to the score, and two layers for each thing that is graded."""
        return width + self.graded * (width * width + width * GRADES)

    def parameters(self, width: int) -> int:
        """The weights, and the biases of the networks."""
        return self.weights(width) + self.graded * (width + GRADES)


def parameter_counts(config: ModelConfig, head: ScoreHead | None = None) -> dict[str, int]:
    """Exact numbers of parameters.

    Args:
        head: of a reward model; None: the vocabulary's.

    Returns:
        total: all of them.
        embedding: those of the embedding and, where it is not tied to it, of the vocabulary's head.
        active: those that one token meets: all but the experts it is not routed to.
        matrices: those in matrices of the layers, all experts included.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    tables = config.vocab_size * width * (1 if config.tie_word_embeddings or head else 2)
    biases = _qkv_size(config) if config.attention_bias else 0
    norms = (4 if config.post_norms else 2) * width + (2 * config.head_size if config.qk_norm else 0)
    rest = tables + layers * (biases + norms) + width + (head.parameters(width) if head else 0)
    return {
        "total": rest + _products(config, config.num_experts),
        "embedding": tables,
        "active": rest + _products(config, config.num_experts_per_tok),
        "matrices": _products(config, config.num_experts),
    }


def forward_flops(config: ModelConfig, segments: Lengths, head: ScoreHead | None = None) -> float:
    """2 N for each token and 4 d_attn for each pair of a query and a key that it sees in a layer.

    N counts the weights in matrix products, the vocabulary's head included, the embedding's look-up not. A
    multiplication and an addition are two FLOPs. Pairs that causality or a window hides are not counted.

    Args:
        head: of a reward model, which costs once in each segment; None: the vocabulary's.
    """
    segments = list(segments)
    tokens = sum(length for length, _ in segments)
    windows = [config.layer_attention(layer).window for layer in range(config.num_hidden_layers)]
    pairs = sum(
        windows.count(window) * sum(attended_pairs(length, prefix, window) for length, prefix in segments)
        for window in set(windows)
    )  # of all layers
    if head is None:
        products = tokens * config.vocab_size * config.hidden_size
    else:
        products = len(segments) * head.weights(config.hidden_size)
    products += tokens * _products(config, config.num_experts_per_tok)
    return 2.0 * products + 4.0 * config.num_attention_heads * config.head_size * pairs


def attended_pairs(length: int, prefix: int = 0, window: int | None = None) -> int:
    """Pairs of query and key in a segment of `length` tokens that also sees a prefix, in one layer and head."""
    return _pairs_before(prefix + length, window) - _pairs_before(prefix, window)


def _pairs_before(length: int, window: int | None) -> int:
    """Of the first `length` queries: the query at position p sees p + 1 keys, or a window's."""
    growing = length if window is None else min(length, window)
    return growing * (growing + 1) // 2 + (length - growing) * growing


def forward_flops_per_token(config: ModelConfig, context: int, head: ScoreHead | None = None) -> float:
    """Of a token in a segment of `context` tokens, averaged over its positions.

    2 N + 4 L d_attn K, where K is (T + 1) / 2, in layers with a window w < T only w - w (w - 1) / (2 T).
    """
    return forward_flops(config, [(context, 0)], head) / context


def training_flops_per_token(config: ModelConfig, context: int, head: ScoreHead | None = None) -> float:
    """Forward and backward, three times the forward pass: 6 N + 12 L d_attn K."""
    return 3 * forward_flops_per_token(config, context, head)


def recomputed_flops_per_token(config: ModelConfig, context: int, head: ScoreHead | None = None) -> float:
    """Of layers that run once more in the backward pass (activation checkpointing).

    The forward pass without the head and without a layer's last product, where no norm behind it wants to know its
    result. The device computes them, the model does not need them: utilisation counts a step's `training_flops` alone.
    """
    width = config.hidden_size
    unneeded = config.vocab_size * width if head is None else head.weights(width) / context
    if not config.post_norms:
        dense = sum(not config.has_experts(layer) for layer in range(config.num_hidden_layers))
        unneeded += dense * config.intermediate_size * width
    return forward_flops_per_token(config, context, head) - 2.0 * unneeded


def training_flops(config: ModelConfig, segments: Lengths, head: ScoreHead | None = None) -> float:
    """Forward and backward, three times the forward pass."""
    return 3 * forward_flops(config, segments, head)


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
