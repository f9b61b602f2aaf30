"""Keys and values of running requests, and the two ways to attend with them: a whole prompt, and a token more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_llm.batch import SegmentBatch
from lightning_llm.generation.dual_chunk import DualChunk
from lightning_llm.models import ModelConfig
from lightning_llm.models.attention import Segments, attention
from lightning_llm.models.soft_cap import soft_capped
from lightning_llm.models.transformer import Transformer


class Cache:
    """Keys and values of B running requests, [B, K, slots, D] per layer.

    Prompts end in the same column, so a step writes one column of all rows; what lies before a shorter one is hidden.
    A layer with a window has as many slots as its window is wide and is a ring: column c stands in slot c mod slots, so
    that a new column takes the place of the one that has just left the window. All other layers have a slot per column.
    """

    def __init__(self, model: Transformer, lengths: Sequence[int], max_new_tokens: int, dual_chunk: DualChunk | None):
        self.used = max(lengths)
        columns = self.used + max_new_tokens - 1  # the last token is never a key
        self.asked = [model.config.layer_attention(layer) for layer in range(model.config.num_hidden_layers)]
        self.slots = slots_of_layers(model.config, columns)
        self.before = [self.used - length for length in lengths]  # columns before a request's first
        self.device = model.embed_tokens.weight.device
        self.dual_chunk = dual_chunk
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of each request so far."""
        return self.used - torch.tensor(self.before, device=self.device)

    def keep(self, rows: list[int]) -> None:
        """Forget the other rows."""
        self.before = [self.before[row] for row in rows]
        index = torch.tensor(rows, device=self.device)
        for layer in range(len(self.keys)):
            self.keys[layer], self.values[layer] = self.keys[layer][index], self.values[layer][index]

    def columns_held(self, slots: int) -> Tensor:
        """Columns that the filled ones of `slots` slots hold, the newest among them, which is `used`."""
        return self.used - (self.used - torch.arange(min(slots, self.used + 1), device=self.device)) % slots

    def mask(self, slots: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of a step's queries, [B, 1, 1, filled slots]: -inf before a request's first
        column; None where all is seen."""
        if max(self.before) <= max(self.used + 1 - slots, 0):  # the oldest column that is held
            return None
        before = torch.tensor(self.before, device=self.device)
        hidden = self.columns_held(slots) < before[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, -torch.inf)[
            :, None, None
        ]


def slots_of_layers(config: ModelConfig, columns: int) -> list[int]:
    """Slots of each layer for texts of so many columns."""
    windows = [config.layer_attention(layer).window for layer in range(config.num_hidden_layers)]
    return [min(columns, window or columns) for window in windows]


def cache_bytes(config: ModelConfig, columns: int, dtype: torch.dtype) -> int:
    """What one request's keys and values take in memory."""
    of_slot = 2 * config.num_key_value_heads * config.head_size * dtype.itemsize
    return of_slot * sum(slots_of_layers(config, columns))


def prefill(model: Transformer, cache: Cache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Compute the prompts as one flat batch and fill the cache; hidden states [B, d] of their last tokens."""
    batch = SegmentBatch.from_documents(prompts).to(cache.device)
    segments = Segments(batch.lengths, batch.prefixes)
    rows = torch.arange(len(prompts), device=cache.device).repeat_interleave(cache.lengths)
    columns = batch.positions + torch.tensor(cache.before, device=cache.device)[rows]
    kept = {slots: (columns >= cache.used - slots).nonzero()[:, 0] for slots in set(cache.slots)}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots = cache.slots[layer]
        tokens = kept[slots]
        for store, new in ((cache.keys, k), (cache.values, v)):
            store.append(new.new_zeros(len(prompts), new.shape[1], slots, new.shape[2]))
            store[layer][rows[tokens], :, columns[tokens] % slots] = new[tokens]
        asked = cache.asked[layer]
        if cache.dual_chunk is not None:
            return cache.dual_chunk.attend(q, k, v, batch.lengths, asked.scale, asked.softcap)
        return attention(
            q,
            k,
            v,
            segments,
            window=asked.window,
            softcap=asked.softcap,
            scale=asked.scale,
            backend=model.attention_backend,
        )

    positions = batch.positions if cache.dual_chunk is None else batch.positions % cache.dual_chunk.period
    return model.run(batch.input_ids, positions, attend)[batch.cu_seqlens[1:] - 1]


def decode(model: Transformer, cache: Cache, tokens: Tensor) -> Tensor:
    """Compute one more token [B] of each row and add it to the cache; hidden states [B, d]."""
    positions = cache.lengths
    masks: dict[int, Tensor | None] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots, asked = cache.slots[layer], cache.asked[layer]
        keys, values = cache.keys[layer], cache.values[layer]
        keys[:, :, cache.used % slots], values[:, :, cache.used % slots] = k, v
        seen = slice(cache.used + 1)
        keys, values = keys[:, :, seen], values[:, :, seen]
        if slots not in masks:
            masks[slots] = cache.mask(slots, q.dtype)
        if cache.dual_chunk is not None:
            of_keys = cache.columns_held(slots) - torch.tensor(cache.before, device=cache.device)[:, None]
            return cache.dual_chunk.attend_step(
                q, keys, values, positions, of_keys, masks[slots], asked.scale, asked.softcap
            )
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, D]: the heads of a group are queries to the same keys
        return attend_step(grouped, keys, values, masks[slots], asked.scale, asked.softcap).flatten(1, 2)

    hidden = model.run(tokens, positions if cache.dual_chunk is None else positions % cache.dual_chunk.period, attend)
    cache.used += 1
    return hidden


def attend_step(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Attention of one query per head to all the keys that are handed in, [B, K, H/K, D].

    Args:
        q: [B, K, H/K, D].
        keys, values: [B, K, C, D].
        mask: added to the scores, [B, 1, 1, C].
        scale: factor of the scores; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap).
    """
    if softcap is None:
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    scores = q @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return weigh(soft_capped(scores, softcap), values, mask)


def weigh(scores: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(scores + mask) values, the softmax in float32."""
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
