"""Does a model prefer what people chose, and how far has it moved: accuracy on held-out pairs, KL to the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.token_store import TokenStore
from lightning_llm.models import Transformer
from lightning_llm.objectives.base import token_logps


class Pair(NamedTuple):
    """A prompt with the response that was chosen and the one that was rejected, as ids."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, np.ndarray]


def sample_pairs(store: TokenStore, count: int, context: int) -> list[Pair]:
    """The first `count` pairs that fit the context."""
    pairs = []
    for row in np.flatnonzero(store.row_contexts <= context)[:count].tolist():
        prompt, chosen, rejected = store.row(row).segments
        pairs.append(Pair(prompt, (chosen, rejected)))
    return pairs


def response_logps(
    model: Transformer,
    prompts: Sequence[ArrayLike],
    responses: Sequence[Sequence[ArrayLike]],
    max_tokens: int,
) -> Float[Tensor, "prompts responses"]:
    """Log-probabilities of whole responses, in nats, on the CPU. All prompts have equally many responses.

    Args:
        max_tokens: of one forward pass.
    """
    device, found = model.head_weight.device, []
    for some_prompts, some_responses in _batches(prompts, responses, max_tokens):
        batch = SegmentBatch.from_groups(some_prompts, some_responses).to(device)
        logps = batch.sum_by_segment(token_logps(model, batch).double())  # [S]
        found.append(logps[batch.prefix >= 0].unflatten(0, (len(some_prompts), -1)).cpu())
    return torch.cat(found)


def preference_accuracy(scores: Float[Tensor, "pairs 2"]) -> float:
    """Share of pairs whose chosen response scores higher; a tie counts one half.

    Args:
        scores: of the chosen and of the rejected response; DPO's implicit reward (up to beta) is log policy - log
            reference, and without a reference the log-likelihood per token tells what a model prefers.
    """
    margins = scores[:, 0] - scores[:, 1]
    return ((margins > 0).double() + 0.5 * (margins == 0).double()).mean().item()


def kl_to_reference(policy: Float[Tensor, "samples"], reference: Float[Tensor, "samples"]) -> float:
    """KL divergence of the policy from the reference, in nats per response: the mean of log policy - log reference.

    Args:
        policy, reference: log-probabilities of responses that the policy has drawn, at temperature 1 and from its
            whole distribution; otherwise the mean is not the divergence.
    """
    return (policy - reference).mean().item()


def _batches(
    prompts: Sequence[ArrayLike], responses: Sequence[Sequence[ArrayLike]], max_tokens: int
) -> Iterator[tuple[list[ArrayLike], list[Sequence[ArrayLike]]]]:
    some_prompts: list[ArrayLike] = []
    some_responses: list[Sequence[ArrayLike]] = []
    tokens = 0
    for prompt, group in zip(prompts, responses, strict=True):
        size = np.size(prompt) + sum(map(np.size, group))
        if some_prompts and tokens + size > max_tokens:
            yield some_prompts, some_responses
            some_prompts, some_responses, tokens = [], [], 0
        some_prompts.append(prompt)
        some_responses.append(group)
        tokens += size
    if some_prompts:
        yield some_prompts, some_responses
