"""Attention with soft-capped scores in blocks of queries, with its own backward: for where no kernel has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_BLOCK = 128  # what lies in the causal future of a whole block is not computed
BLOCK_SCORES = 2**21  # pairs of query and key over all rows and heads that are in memory at a time


def softcapped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float, scale: float) -> Tensor:
    """softmax(softcap * tanh(scale q k' / softcap) + mask) v (Gemma 2, arXiv 2408.00118, section 2), in float32.

    Args:
        q: queries [R, H, Q, D].
        k, v: keys and values [R, K, N, D]; H is a multiple of K.
        mask: added to the capped scores, [R or 1, 1, Q, N], no gradient; None: causal, and Q is N.
        softcap: > 0, in the scores' unit.
        scale: factor of the scores.

    Returns:
        [R, H, Q, D] in the type of q.
    """
    return Softcapped.apply(q, k, v, mask, softcap, scale)


class Softcapped(torch.autograd.Function):
    """Backward computes the probabilities again, as flash attention does: nothing of size Q x N is kept."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.softcap, ctx.scale = softcap, scale
        output = torch.empty_like(q)
        for block in blocks(q, k, mask):
            q_block, k_block, v_block = block.select(q, k, v)
            probabilities, _ = block.probabilities(q_block, k_block, softcap, scale)
            output[block.rows, :, block.queries] = block.ungrouped(probabilities @ v_block, q)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # with t = tanh(scale q k' / softcap), P = softmax(softcap t), dP = g v':
        # dv = P' g,  dS = P (dP - sum over keys of P dP) (1 - t^2) scale,  dq = dS k,  dk = dS' q
        q, k, v, mask = ctx.saved_tensors
        exact = torch.promote_types(q.dtype, torch.float32)
        q_gradient = torch.empty_like(q)
        k_gradient, v_gradient = (torch.zeros_like(x, dtype=exact) for x in (k, v))
        for block in blocks(q, k, mask):
            q_block, k_block, v_block = block.select(q, k, v)
            g_block, _, _ = block.select(gradient, k, v)
            probabilities, capped = block.probabilities(q_block, k_block, ctx.softcap, ctx.scale)
            v_gradient[block.rows, :, block.keys] += probabilities.mT @ g_block
            scores = g_block @ v_block.mT
            scores.sub_((scores * probabilities).sum(-1, keepdim=True)).mul_(probabilities)
            scores.addcmul_(scores * capped, capped, value=-1).mul_(ctx.scale)
            q_gradient[block.rows, :, block.queries] = block.ungrouped(scores @ k_block, q)
            k_gradient[block.rows, :, block.keys] += scores.mT @ q_block
        return q_gradient, k_gradient.to(k.dtype), v_gradient.to(v.dtype), None, None, None


@dataclass(frozen=True)
class Block:
    """Some rows' run of queries with all the keys that it may see; heads that share keys are queries side by side."""

    rows: slice
    queries: slice
    keys: slice
    mask: Tensor  # [rows or 1, 1, 1, queries, some last keys]; those before are seen by all the queries

    def select(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, K, H/K * queries, D], [rows, K, keys, D] twice; float32, or float64 as it comes."""
        exact = torch.promote_types(q.dtype, torch.float32)
        q = q[self.rows, :, self.queries].unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        return q.to(exact), k[self.rows, :, self.keys].to(exact), v[self.rows, :, self.keys].to(exact)

    def ungrouped(self, x: Tensor, q: Tensor) -> Tensor:
        """[rows, H, queries, D] of [rows, K, H/K * queries, D]."""
        return x.unflatten(2, (q.shape[1] // x.shape[1], -1)).flatten(1, 2)

    def probabilities(self, q: Tensor, k: Tensor, softcap: float, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax over the keys, and tanh(score / softcap), both [rows, K, H/K * queries, keys]."""
        capped = torch.matmul(q * (scale / softcap), k.mT).tanh_()
        scores = capped * softcap
        queries = self.mask.shape[-2]
        scores.unflatten(2, (-1, queries))[..., -self.mask.shape[-1] :] += self.mask
        return scores.softmax(-1), capped


def blocks(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[Block]:
    """All pairs of query and key that count, in parts of about BLOCK_SCORES."""
    rows, heads, queries, _ = q.shape
    if mask is None:
        future = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
        for first in range(0, queries, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, queries)
            size = last - first
            for part in parts(rows, heads * size * last):
                yield Block(part, slice(first, last), slice(last), future[None, None, None, :size, :size])
    else:
        for part in parts(rows, heads * queries * k.shape[2]):
            its_mask = mask if len(mask) == 1 else mask[part]
            yield Block(part, slice(queries), slice(k.shape[2]), its_mask.unsqueeze(2))


def parts(rows: int, scores: int) -> list[slice]:
    """Rows, of so many scores each, in as many at a time as make BLOCK_SCORES; at least one."""
    step = max(BLOCK_SCORES // scores, 1)
    return [slice(first, first + step) for first in range(0, rows, step)]
