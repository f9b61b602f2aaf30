"""Attention of several responses to the prompt that they share: its keys and values are read once for all of them.

Each row of a cache holds its prompt, so any row of a prompt can lend it to the others. What is read once is the number
of tokens that all running prompts have at least; prompts come in by length, so this is nearly all of them. As in
Hydragen (Juravsky et al. 2024, arXiv 2402.05099), but with one softmax over both parts in the place of two that are
combined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_llm.models.soft_cap import soft_capped


@dataclass(frozen=True)
class SharedPrompt:
    """Which rows have the same prompt."""

    lenders: Tensor | slice  # [G], a row of each prompt; a slice where they are evenly spaced: nothing is copied then
    members: Tensor  # [G, S], its rows; filled up with the lender where others have more
    places: Tensor  # [B], where each row stands among G * S
    length: int  # tokens of every prompt that are read once

    @classmethod
    def of_rows(cls, prompts: Sequence[tuple[int, int]], device: torch.device) -> SharedPrompt | None:
        """None where there is too little to share.

        Args:
            prompts: number and length of each row's.
        """
        rows: dict[int, list[int]] = {}
        for row, (number, _) in enumerate(prompts):
            rows.setdefault(number, []).append(row)
        if not prompts or len(prompts) < 2 * len(rows):
            return None
        most = max(map(len, rows.values()))
        places = [0] * len(prompts)
        for group, members in enumerate(rows.values()):
            for place, row in enumerate(members):
                places[row] = group * most + place
        filled = [members + members[:1] * (most - len(members)) for members in rows.values()]
        first, *others = lenders = [members[0] for members in rows.values()]
        even = slice(first, lenders[-1] + 1, others[0] - first if others and others[0] > first else 1)
        is_even = list(range(len(prompts)))[even] == lenders
        members = torch.tensor(filled, device=device)
        return cls(
            even if is_even else members[:, 0],
            members,
            torch.tensor(places, device=device),
            min(length for _, length in prompts),
        )

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        """`cache.attend_step`, [B, K, H/K, D]: the same sums, of which the shared part is read once for each prompt."""
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        shared = self._grouped(q) @ keys[self.lenders, :, : self.length].transpose(-1, -2)
        own = q @ keys[:, :, self.length :].transpose(-1, -2)
        own = soft_capped(own, softcap)
        own = own if mask is None else own + mask[..., self.length :]
        scores = torch.cat((soft_capped(self._by_row(shared, q.shape[2]), softcap), own), dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        of_shared, of_own = weights.split((self.length, own.shape[-1]), dim=-1)
        mixed = self._grouped(of_shared) @ values[self.lenders, :, : self.length]
        return self._by_row(mixed, q.shape[2]) + of_own @ values[:, :, self.length :]

    def _grouped(self, x: Tensor) -> Tensor:
        """[B, K, n, c] -> [G, K, S * n, c]."""
        return x[self.members].transpose(1, 2).flatten(2, 3)

    def _by_row(self, x: Tensor, heads: int) -> Tensor:
        """[G, K, S * n, c] -> [B, K, n, c]."""
        return x.unflatten(2, (-1, heads)).transpose(1, 2).flatten(0, 1)[self.places]
