"""Continue prompts: those of like length in one batch, computed once, then a token at a time over a KV cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_llm.batch import SegmentBatch
from lightning_llm.generation.sampling import next_tokens, request_uniforms
from lightning_llm.models.attention import Segments, attention
from lightning_llm.models.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """A response to each prompt, the stop token included if there is one.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: a response is cut after so many.
        stop_ids: tokens that end a response.
        temperature: of sampling; 0 is greedy.
        top_p: of sampling, see sampling.next_tokens.
        seed: of sampling. A sample depends on the seed and the request's place in `prompts`, not on its batch.
        batch_size: prompts computed together.

    Raises:
        ValueError: an empty prompt, or a number out of range.
    """
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError("max_new_tokens and batch_size are at least 1, temperature at least 0, top_p in (0, 1]")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has at least one token")
    responses: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda request: len(prompts[request]))
    for first in range(0, len(prompts), batch_size):
        running = by_length[first : first + batch_size]  # requests, in the order of the cache's rows
        draws = torch.stack([request_uniforms(request, max_new_tokens, seed) for request in running])  # [B, new tokens]
        cache = Cache([len(prompts[request]) for request in running], max_new_tokens, model.embed_tokens.weight.device)
        hidden = prefill(model, cache, [prompts[request] for request in running])
        for step in range(max_new_tokens):
            uniforms = draws[:, step].to(hidden.device)
            tokens = next_tokens(model.logits(hidden), uniforms, temperature, top_p)
            for request, token in zip(running, tokens.tolist(), strict=True):
                if not responses[request] or responses[request][-1] not in stop_ids:
                    responses[request].append(token)
            unfinished = [row for row, request in enumerate(running) if responses[request][-1] not in stop_ids]
            if not unfinished or step == max_new_tokens - 1:
                break
            if len(unfinished) <= len(running) * 3 // 4:  # moving the cache pays only if many rows go
                rows = torch.tensor(unfinished, device=tokens.device)
                running, draws, tokens = [running[row] for row in unfinished], draws[unfinished], tokens[rows]
                cache.keep(rows)
            hidden = decode(model, cache, tokens)
    return responses


class Cache:
    """Keys and values of B running requests, [B, K, columns, D] per layer.

    Prompts end in the same column, so a step writes one column of all rows; what lies before a shorter one is hidden.
    """

    def __init__(self, lengths: list[int], max_new_tokens: int, device: torch.device):
        self.used = max(lengths)
        self.columns = self.used + max_new_tokens - 1  # the last token is never a key
        self.lengths = torch.tensor(lengths, device=device)  # [B] tokens so far
        self.before = self.used - self.lengths  # [B] columns before a request's first
        self.hides = torch.zeros(len(lengths), 1, 1, self.columns, device=device)
        self.hides.masked_fill_(
            torch.arange(self.columns, device=device) < self.before[:, None, None, None], -torch.inf
        )
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def keep(self, rows: Tensor) -> None:
        """Forget the other rows."""
        self.lengths, self.hides = self.lengths[rows], self.hides[rows]
        for layer in range(len(self.keys)):
            self.keys[layer], self.values[layer] = self.keys[layer][rows], self.values[layer][rows]


def prefill(model: Transformer, cache: Cache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Compute the prompts as one flat batch and fill the cache; hidden states [B, d] of their last tokens."""
    batch = SegmentBatch.from_documents(prompts).to(cache.lengths.device)
    segments = Segments(batch.lengths, batch.prefixes)
    rows = torch.arange(len(prompts), device=cache.lengths.device).repeat_interleave(cache.lengths)
    columns = batch.positions + cache.before[rows]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for store, new in ((cache.keys, k), (cache.values, v)):
            store.append(new.new_zeros(len(prompts), new.shape[1], cache.columns, new.shape[2]))
            store[layer][rows, :, columns] = new
        return attention(q, k, v, segments, backend=model.attention_backend)

    return model.run(batch.input_ids, batch.positions, attend)[batch.cu_seqlens[1:] - 1]


def decode(model: Transformer, cache: Cache, tokens: Tensor) -> Tensor:
    """Compute one more token [B] of each row and add it to the cache; hidden states [B, d]."""
    column = cache.used
    hides = cache.hides[..., : column + 1]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        keys[:, :, column], values[:, :, column] = k, v
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, D]: the heads of a group are queries to the same keys
        seen = slice(column + 1)
        return scaled_dot_product_attention(
            grouped, keys[:, :, seen], values[:, :, seen], attn_mask=hides.to(q.dtype)
        ).flatten(1, 2)

    hidden = model.run(tokens, cache.lengths, attend)
    cache.lengths = cache.lengths + 1
    cache.used += 1
    return hidden
