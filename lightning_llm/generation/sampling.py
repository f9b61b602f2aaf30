"""The next token of each row: the likeliest, or drawn from the likeliest with randomness of the request's own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_llm.generation.config import Sampling

BLOCK = 128  # entries that are summed up before they are looked at one by one
BELOW_ONE = 1 - 2**-53


def request_uniforms(request: int, count: int, seed: int) -> Tensor:
    """`count` numbers in [0, 1), float64, that depend on the seed and the request's number alone, not on its batch.

    Args:
        seed: in [0, 2^64). Below 2^32 it is one that somebody has typed; above, as a digest is, all of its bits and the
            request's number are the key of a generator (Philox; Salmon et al. 2011), so that no two share any numbers.
    """
    if seed >= 2**32:  # torch's generator knows 32 bits of a seed
        key = np.array([seed, request], np.uint64)
        return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(count))
    mixed = (seed * 0x9E3779B1 + request) % 2**32  # neighbouring seeds share no request's numbers
    return torch.rand(count, generator=torch.Generator().manual_seed(mixed), dtype=torch.float64)


def next_tokens(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, said: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token per row, int64 [B], and its log-probability in what it was drawn from, nats, float32 [B].

    Args:
        logits: [B, V].
        uniforms: [B] in [0, 1), float64: where in the cumulated distribution a row's token is taken.
        sampling: what is drawn from; temperature 0 takes the largest logit, which is then the only possible token.
        said: bool [B, V], the tokens that a row has already; None: none is penalised.
    """
    if said is not None:
        logits = torch.where(said, penalised(logits, sampling.repetition_penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    probabilities = (logits if sampling.temperature == 1 else logits / sampling.temperature).softmax(-1, torch.float32)
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        choice = tokens = draw(probabilities, uniforms)
        return tokens, probabilities.gather(-1, choice.unsqueeze(-1)).squeeze(-1).log()
    weights, order = probabilities.sort(dim=-1, descending=True, stable=True)
    weights = likeliest(weights, sampling)
    choice = draw(weights, uniforms)
    tokens = order.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    drawn = weights.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    return tokens, (drawn / weights.sum(-1)).log()


def penalised(logits: Tensor, penalty: float) -> Tensor:
    """Logits of what was said already: x / penalty, of negative ones x * penalty, so that they too become less likely
    (Keskar et al. 2019, arXiv 1909.05858, section 4.1, which divides all; of negative ones as in transformers).

    Args:
        logits: any shape.
        penalty: > 0; 1 changes nothing.

    Returns:
        In the shape of `logits`.
    """
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def likeliest(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V], largest first, with 0 for what is not drawn from; the first always stays.

    Each cut sees what the one before has left: `top_k`, then `top_p` (Holtzman et al. 2020, arXiv 1904.09751), then
    `min_p` (Nguyen et al. 2024, arXiv 2407.01082).
    """
    if sampling.top_k:
        probabilities = probabilities[:, : sampling.top_k]
    if sampling.top_p < 1:
        more_likely = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (more_likely < sampling.top_p * probabilities.sum(-1, keepdim=True))
    if sampling.min_p:
        probabilities = probabilities * (probabilities >= sampling.min_p * probabilities[:, :1])
    return probabilities


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index [B] of the entry of each row [B, V] in which its uniform falls; entries of weight 0 are never drawn.

    The inverse of the cumulated weights in two steps: which block, by the blocks' sums, then where in it. So only sums
    see the whole row, and they are several times as fast as cumulating it.
    """
    size = weights.shape[-1]
    padded = pad(weights, (0, -size % BLOCK)) if size % BLOCK else weights
    blocks = padded.unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1)  # [B, blocks]
    reached = sums.cumsum(-1, dtype=torch.float64)
    aim = uniforms.unsqueeze(-1) * reached[:, -1:]
    block = torch.searchsorted(reached, aim, right=True)  # [B, 1]
    of_block = sums.gather(-1, block).double()
    share = ((aim - reached.gather(-1, block) + of_block) / of_block).clamp(0, BELOW_ONE)
    inside = blocks.take_along_dim(block.unsqueeze(-1), dim=1).squeeze(1).cumsum(-1, dtype=torch.float64)  # [B, BLOCK]
    place = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    return (block * BLOCK + place).squeeze(-1)
