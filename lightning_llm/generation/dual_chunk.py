"""Dual chunk attention: a model that knows c positions reads longer texts, untrained.

An et al. 2024, arXiv 2402.17463, section 3, equations 2 to 7. With chunks of s = c - w tokens, key j stands at position
j mod s, whatever chunk it is in. Query i stands at three positions, one for each age of a chunk:

    keys of its own chunk       i mod s                   distances as they are
    keys of the chunk before    min(i mod s + s, c - 1)   distances as they are for the first w queries of a chunk
    keys of older chunks        c - 1                     far away, but never further than the model has seen

All keys enter one softmax. Released code lets the last two reach c; here they end at c - 1, as in the paper. For a text
of one chunk this is ordinary attention. The frequencies, and YaRN's factor, are the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_llm.generation.config import DualChunkConfig
from lightning_llm.models.rope import rotate, rotation
from lightning_llm.models.soft_cap import soft_capped

SCORES = 2**24  # that exist at once while a prompt is computed


class DualChunk:
    """Dual chunk attention in the place of a model's own. Queries and keys come turned to their positions mod `period`;
    a query's other two positions are so many further turns."""

    def __init__(self, config: DualChunkConfig, frequencies: Tensor):
        """
        Args:
            config: with a chunk_size.
            frequencies: of the model's rotary positions [D/2], radians per token.
        """
        assert config.chunk_size is not None
        self.period, self.last, self.frequencies = config.period, config.chunk_size - 1, frequencies

    def by_age(self, q: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D] towards keys of their own chunk, of the one before, and of older ones.

        Args:
            q: turned to `positions` mod `period`.
            positions: [T] in the text.
        """
        turned = positions % self.period
        before = (turned + self.period).clamp(max=self.last)
        turns = [rotation(to - turned, self.frequencies) for to in (before, torch.full_like(turned, self.last))]
        return q, rotate(q, *turns[0]), rotate(q, *turns[1])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float | None, softcap: float | None
    ) -> Tensor:
        """Causal attention within each of the texts that lie one after the other, [T, H, D].

        Args:
            q: [T, H, D].
            k, v: [T, K, D].
            lengths: of the texts, T in all.
            scale: factor of the scores; None: 1 / sqrt(D).
            softcap: scores become softcap * tanh(score / softcap).
        """
        heads = k.shape[1]
        positions = torch.cat([torch.arange(length, device=q.device) for length in lengths])
        grouped = [x.unflatten(1, (heads, -1)).permute(1, 2, 0, 3) for x in self.by_age(q, positions)]  # [K, H/K, T, D]
        keys, values = k.permute(1, 2, 0), v.transpose(0, 1)  # [K, D, T], [K, T, D]
        output = torch.empty_like(q)
        start = 0
        for length in lengths:
            size = max(SCORES // (q.shape[1] * length), 16)  # queries of a block
            for chunk in range(0, length, self.period):
                older, own = max(chunk - self.period, 0), min(chunk + self.period, length)
                for first in range(chunk, own, size):
                    end = min(first + size, own)
                    block, spans = slice(start + first, start + end), ((chunk, end), (older, chunk), (0, older))
                    scores = [
                        torch.bmm(x[:, :, block].flatten(1, 2), keys[:, :, start + low : start + high])
                        for x, (low, high) in zip(grouped, spans, strict=True)
                    ]
                    future = torch.ones(end - first, end, dtype=torch.bool, device=q.device).triu_(first + 1)
                    scores = self._finished(torch.cat(scores[::-1], dim=-1), scale, softcap, q.shape[-1])
                    scores = scores.unflatten(1, (-1, end - first)).masked_fill_(future, -torch.inf)  # [K, H/K, n, end]
                    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype).flatten(1, 2)
                    mixed = torch.bmm(weights, values[:, start : start + end]).unflatten(1, (-1, end - first))
                    output[block] = mixed.permute(2, 0, 1, 3).flatten(1, 2)
            start += length
        return output

    def attend_step(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        of_keys: Tensor,
        mask: Tensor | None,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention of one more token of each of B texts to its keys, [B, H, D].

        Args:
            q: [B, H, D].
            keys, values: [B, K, C, D].
            positions: [B] of the tokens.
            of_keys: [B, C] positions of the keys; below 0 where `mask` hides what is none.
            mask: added to the scores, [B, 1, 1, C].
            scale, softcap: as in `attend`.
        """
        heads = keys.shape[1]
        queries = torch.stack(
            [x.unflatten(1, (heads, -1)) for x in self.by_age(q, positions)], dim=2
        )  # [B, K, 3, .., D]
        scores = (queries.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (3, -1))  # [B, K, 3, H/K, C]
        age = (positions[:, None] // self.period - of_keys.clamp(min=0) // self.period).clamp(0, 2)
        age = age[:, None, None, None].expand(-1, heads, 1, scores.shape[3], -1)
        scores = self._finished(scores.gather(2, age).squeeze(2), scale, softcap, q.shape[-1])
        scores = scores if mask is None else scores + mask
        return (scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values).flatten(1, 2)

    @staticmethod
    def _finished(scores: Tensor, scale: float | None, softcap: float | None, head_size: int) -> Tensor:
        return soft_capped(scores * (head_size**-0.5 if scale is None else scale), softcap)
