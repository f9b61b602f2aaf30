"""Keys and values of running requests, and two ways to attend with them: whole prompts, and a token more of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_llm.batch import SegmentBatch
from lightning_llm.generation.dual_chunk import DualChunk
from lightning_llm.generation.shared_prompt import SharedPrompt
from lightning_llm.models import ModelConfig
from lightning_llm.models.attention import Segments, attention
from lightning_llm.models.soft_cap import soft_capped
from lightning_llm.models.transformer import Transformer


class Cache:
    """Keys and values of at most `rows` running requests, [rows, K, slots, D] per layer.

    The token at position p of a request stands in slot p mod slots of its row. A layer with a window has as many slots
    as its window is wide and is a ring: a token takes the place of the one that has just left the window. All other
    layers have a slot per position. Requests come and go on their own; the rows in use are the first ones, without a
    gap, so that a step computes nothing for nobody.
    """

    def __init__(self, model: Transformer, rows: int, positions: int, dual_chunk: DualChunk | None = None):
        """
        Args:
            rows: requests that run at once, at most.
            positions: of the longest of them, prompt and response; its last token needs none.
        """
        layers = range(model.config.num_hidden_layers)
        self.rows, self.positions = rows, positions
        self.asked = [model.config.layer_attention(layer) for layer in layers]
        self.slots = slots_of_layers(model.config, positions)
        self.heads = model.config.num_key_value_heads
        self.lengths: list[int] = []  # tokens of each row in use
        self.prompts: list[tuple[int, int]] = []  # of each row in use: which, and how long
        self.seen = 0  # prompts so far
        self.shared: SharedPrompt | None = None
        self.has_changed = False  # who is in it, since `shared` was found
        self.device = model.embed_tokens.weight.device
        self.dual_chunk = dual_chunk
        self.keys: list[Tensor] = []  # made by the first prompts, in the type that they are computed in
        self.values: list[Tensor] = []

    def places(self, rows: Tensor, slots: Tensor, of: int) -> Tensor:
        """Where tokens stand among all rows, heads and slots of a layer that has `of` slots: [T * K] of rows [T] and
        slots [T]."""
        heads = torch.arange(self.heads, device=rows.device)
        return ((rows[:, None] * self.heads + heads) * of + slots[:, None]).flatten()

    def add(self, layer: int, k: Tensor, v: Tensor, places: Tensor) -> None:
        """Put keys and values [T, K, D] into `places` [T * K]."""
        if layer == len(self.keys):
            shape = (self.rows, k.shape[1], self.slots[layer], k.shape[2])
            self.keys.append(k.new_zeros(shape))
            self.values.append(v.new_zeros(shape))
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            stored.view(-1, stored.shape[-1]).index_copy_(0, places, new.flatten(0, 1))

    def remove(self, row: int) -> None:
        """Forget a request; the last one moves into its row."""
        last = len(self.lengths) - 1
        if row != last:
            for stored in (*self.keys, *self.values):
                filled = min(self.lengths[last], stored.shape[2])
                stored[row, :, :filled] = stored[last, :, :filled]
            self.lengths[row], self.prompts[row] = self.lengths[last], self.prompts[last]
        self.lengths.pop()
        self.prompts.pop()
        self.has_changed = True

    def grow(self, lengths: Sequence[int], copies: Sequence[int]) -> None:
        """Count rows of new prompts in, each as often as it has copies."""
        for length, count in zip(lengths, copies, strict=True):
            self.lengths += [length] * count
            self.prompts += [(self.seen, length)] * count
            self.seen += 1
        self.has_changed = True

    def find_shared(self) -> SharedPrompt | None:
        """Which rows have a prompt in common; None where it does not pay to read their prompt once."""
        if self.device.type != "cpu":  # 1.6 times as slow on an H200 (64 rows, prompts of 512): a step is its launches
            return None
        if self.has_changed:
            self.shared, self.has_changed = SharedPrompt.of_rows(self.prompts, self.device), False
        return self.shared


def hide_empty(lengths: Tensor, filled: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a query to each of the texts [B] of so many tokens, [B, 1, 1, filled]: -inf where
    a text has none."""
    empty = torch.arange(filled, device=lengths.device) >= lengths[:, None]
    return torch.zeros(empty.shape, dtype=dtype, device=lengths.device).masked_fill_(empty, -torch.inf)[:, None, None]


def hide_empty_if_any(lengths: Sequence[int], slots: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """`hide_empty` of as many slots as are filled; None where all are filled alike."""
    filled = min(max(lengths), slots)
    return None if min(lengths) >= filled else hide_empty(torch.tensor(lengths, device=device), filled, dtype)


def slots_of_layers(config: ModelConfig, positions: int) -> list[int]:
    """Slots of each layer for texts of so many positions."""
    windows = [config.layer_attention(layer).window for layer in range(config.num_hidden_layers)]
    return [min(positions, window or positions) for window in windows]


def cache_bytes(config: ModelConfig, positions: int, dtype: torch.dtype) -> int:
    """What one request's keys and values take in memory."""
    of_slot = 2 * config.num_key_value_heads * config.head_size * dtype.itemsize
    return of_slot * sum(slots_of_layers(config, positions))


def prefill(model: Transformer, cache: Cache, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
    """Compute prompts as one flat batch, each once, and give each as many new rows as it has copies.

    Returns:
        [P, d] hidden states of the prompts' last tokens.
    """
    batch = SegmentBatch.from_documents(prompts).to(cache.device)
    segments = Segments(batch.lengths, batch.prefixes)
    places: dict[int, tuple[Tensor, Tensor]] = {}  # slots of a layer -> which tokens, and where they go
    for slots in set(cache.slots):
        tokens, rows, row = [], [], len(cache.lengths)
        for begin, length, count in zip(batch.cu_seqlens.tolist(), batch.lengths, copies, strict=False):
            kept = torch.arange(begin + max(length - slots, 0), begin + length)
            tokens += [kept] * count
            rows += [torch.full_like(kept, row + copy) for copy in range(count)]
            row += count
        chosen = torch.cat(tokens).to(cache.device)
        places[slots] = chosen, cache.places(torch.cat(rows).to(cache.device), batch.positions[chosen] % slots, slots)

    last = batch.cu_seqlens[1:] - 1
    firsts = torch.tensor([0, *copies[:-1]], device=cache.device).cumsum(0) + len(cache.lengths)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, where = places[cache.slots[layer]]
        cache.add(layer, k[tokens], v[tokens], where)
        asked, is_last = cache.asked[layer], layer == len(cache.slots) - 1
        if cache.dual_chunk is not None:
            attended = cache.dual_chunk.attend(q, k, v, batch.lengths, asked.scale, asked.softcap)
            return attended[last] if is_last else attended
        if is_last:  # one query of each prompt, to what it has just put into its first row
            filled = min(max(batch.lengths), cache.slots[layer])
            keys, values = (stored[layer][firsts, :, :filled] for stored in (cache.keys, cache.values))
            mask = hide_empty_if_any(batch.lengths, cache.slots[layer], q.dtype, cache.device)
            grouped = q[last].unflatten(1, (k.shape[1], -1))
            return attend_step(grouped, keys, values, mask, asked.scale, asked.softcap).flatten(1, 2)
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
    hidden = model.run(batch.input_ids, positions, attend, kept=last)
    cache.grow(batch.lengths, copies)
    return hidden


def decode(model: Transformer, cache: Cache, tokens: Tensor) -> Tensor:
    """Compute one more token [B] of each row in use and add it to the cache; hidden states [B, d]."""
    lengths, dtype = [length + 1 for length in cache.lengths], model.embed_tokens.weight.dtype
    masks = {slots: hide_empty_if_any(lengths, slots, dtype, cache.device) for slots in set(cache.slots)}
    positions = torch.tensor(cache.lengths, device=cache.device)
    hidden = step(model, cache, tokens.to(cache.device), positions, max(lengths), masks, cache.find_shared())
    cache.lengths = lengths
    return hidden


def step(
    model: Transformer,
    cache: Cache,
    tokens: Tensor,
    positions: Tensor,
    longest: int,
    masks: Mapping[int, Tensor | None],
    shared: SharedPrompt | None = None,
) -> Tensor:
    """One more token of each of the first rows, hidden states [B, d]. Counts nothing, so it may be done again.

    Args:
        tokens, positions: int64 [B]; a position is where a token goes.
        longest: slots that are read of a layer that has so many.
        masks: for each number of slots what hides the empty ones of those that are read; None: there are none.
        shared: which rows have their prompt in common.
    """
    count = len(tokens)
    rows = torch.arange(count, device=cache.device)
    places = {slots: cache.places(rows, positions % slots, slots) for slots in set(cache.slots)}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots, asked = cache.slots[layer], cache.asked[layer]
        cache.add(layer, k, v, places[slots])
        filled = min(longest, slots)
        keys, values = cache.keys[layer][:count, :, :filled], cache.values[layer][:count, :, :filled]
        mask = masks[slots]
        mask = None if mask is None else mask.to(q.dtype)
        if cache.dual_chunk is not None:
            held = torch.arange(filled, device=cache.device)  # the newest position of each slot, below 0 where empty
            of_keys = positions[:, None] - (positions[:, None] - held) % slots
            return cache.dual_chunk.attend_step(q, keys, values, positions, of_keys, mask, asked.scale, asked.softcap)
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, D]: the heads of a group are queries to the same keys
        is_whole = asked.window is None or slots < asked.window  # and no ring, whose slots have another order
        way = attend_step if shared is None or not is_whole else shared.attend
        return way(grouped, keys, values, mask, asked.scale, asked.softcap).flatten(1, 2)

    return model.run(tokens, positions if cache.dual_chunk is None else positions % cache.dual_chunk.period, attend)


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
    """softmax(scores + mask) values, the softmax in float32.

    Args:
        scores: [..., Q, N], of Q queries to N keys.
        values: [..., N, D].
        mask: added, of a shape that broadcasts to that of the scores; None: all keys are seen.

    Returns:
        [..., Q, D] in the type of the values.
    """
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
