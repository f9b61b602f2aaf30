"""Continue prompts: those of like length in one batch, computed once, then a token at a time over a KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from lightning_llm.generation.cache import Cache, decode, prefill
from lightning_llm.generation.config import DualChunkConfig, Sampling
from lightning_llm.generation.dual_chunk import DualChunk
from lightning_llm.generation.sampling import next_tokens, request_uniforms
from lightning_llm.models.rope import inverse_frequencies
from lightning_llm.models.transformer import Transformer
from lightning_llm.settings import UserError

GREEDY = Sampling()
Listener = Callable[
    [int, int, bool], bool
]  # request, its new token, whether that is its last -> whether to end it here


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int = 64,
    context: int | None = None,
    dual_chunk: DualChunkConfig | None = None,
    listen: Listener | None = None,
) -> list[list[int]]:
    """A response to each prompt, the stop token included if there is one.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: a response is cut after so many.
        stop_ids: tokens that end a response.
        sampling: how tokens are drawn.
        seed: of sampling. A sample depends on the seed and the request's place in `prompts`, not on its batch.
        batch_size: prompts computed together.
        context: prompt and response have so many tokens at most; None: any number.
        dual_chunk: dual chunk attention in the place of the model's own.
        listen: hears every token as soon as it is known.

    Raises:
        ValueError: an empty prompt, one that leaves no room in the context, or a number out of range.
        UserError: dual chunk attention of a model with sliding windows.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError("max_new_tokens and batch_size are at least 1")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has at least one token")
    limits = [min(max_new_tokens, (context or math.inf) - len(prompt)) for prompt in prompts]
    if min(limits, default=1) < 1:
        raise ValueError(f"the context of {context} tokens has at least one token more than a prompt")
    chunks = build_dual_chunk(model, dual_chunk)
    responses: list[list[int]] = [[] for _ in prompts]

    def goes_on(request: int, token: int) -> bool:
        response = responses[request]
        response.append(token)
        is_last = token in stop_ids or len(response) == limits[request]
        return not (listen is not None and listen(request, token, is_last)) and not is_last

    by_length = sorted(range(len(prompts)), key=lambda request: len(prompts[request]))
    for first in range(0, len(prompts), batch_size):
        running = by_length[first : first + batch_size]  # requests, in the order of the cache's rows
        steps = int(max(limits[request] for request in running))
        draws = torch.stack([request_uniforms(request, steps, seed) for request in running])  # [B, steps]
        cache = Cache(model, [len(prompts[request]) for request in running], steps, chunks)
        hidden = prefill(model, cache, [prompts[request] for request in running])
        said = (
            said_already(model, [prompts[request] for request in running]) if sampling.repetition_penalty != 1 else None
        )
        ended: set[int] = set()
        for step in range(steps):
            tokens = next_tokens(model.logits(hidden), draws[:, step].to(hidden.device), sampling, said)
            for request, token in zip(running, tokens.tolist(), strict=True):
                if request not in ended and not goes_on(request, token):
                    ended.add(request)
            unfinished = [row for row, request in enumerate(running) if request not in ended]
            if not unfinished:
                break
            if len(unfinished) <= len(running) * 3 // 4:  # moving the cache pays only if many rows go
                running, draws = [running[row] for row in unfinished], draws[unfinished]
                tokens = tokens[torch.tensor(unfinished, device=tokens.device)]
                cache.keep(unfinished)
                said = None if said is None else said[unfinished]
            if said is not None:
                said.scatter_(1, tokens[:, None], True)
            hidden = decode(model, cache, tokens)
    return responses


def said_already(model: Transformer, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Which tokens each prompt has, bool [B, V]."""
    said = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        said[row, list(prompt)] = True
    return said.to(model.embed_tokens.weight.device)


def build_dual_chunk(model: Transformer, config: DualChunkConfig | None) -> DualChunk | None:
    """Dual chunk attention for a model, if it is asked for."""
    if config is None or config.chunk_size is None:
        return None
    if any(model.config.layer_attention(layer).window for layer in range(model.config.num_hidden_layers)):
        raise UserError(
            "dual_chunk", f"{model.config.name} has layers with a sliding window", "Use a model that sees all of a text"
        )
    device = model.embed_tokens.weight.device
    return DualChunk(config, inverse_frequencies(model.config.rope_parameters, model.config.head_size, device))
