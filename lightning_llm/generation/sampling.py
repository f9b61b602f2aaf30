"""The next token of each row: the likeliest, or drawn from the likeliest with randomness of the request's own."""

from __future__ import annotations

import torch
from torch import Tensor


def request_uniforms(request: int, count: int, seed: int) -> Tensor:
    """`count` numbers in [0, 1), float64, that depend on the seed and the request's number alone, not on its batch."""
    mixed = (seed * 0x9E3779B1 + request) % 2**32  # neighbouring seeds share no request's numbers
    return torch.rand(count, generator=torch.Generator().manual_seed(mixed), dtype=torch.float64)


def next_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row, int64 [B].

    Args:
        logits: [B, V].
        uniforms: [B] in [0, 1), float64: where in the cumulated distribution a row's token is taken.
        temperature: logits are divided by it; 0 takes the largest.
        top_p: only the fewest most likely tokens whose probabilities reach it are drawn from (Holtzman et al. 2020,
            arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p == 1:
        return draw(probabilities, uniforms)
    probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    more_likely = probabilities.cumsum(-1) - probabilities
    choice = draw(probabilities * (more_likely < top_p), uniforms)
    return tokens.gather(-1, choice.unsqueeze(-1)).squeeze(-1)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index [B] of the entry of each row [B, V] in which its uniform falls; entries of weight 0 are never drawn."""
    reached = weights.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(reached, uniforms.unsqueeze(-1) * reached[:, -1:], right=True).squeeze(-1)
