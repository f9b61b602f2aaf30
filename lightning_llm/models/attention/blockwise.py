"""Attention in blocks of queries with its own backward: soft-capped scores anywhere, and short rows on a CPU.

What lies in the causal future of a whole block is never computed, and a block's scores fit the cache of a core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_BLOCK = {"cpu": 64, "cuda": 512}
BLOCK_SCORES = {"cpu": 2**18, "cuda": 2**25}  # pairs of query and key over all rows and heads of a block
LONGEST_KEPT = 1024  # queries of a row whose probabilities are kept for backward: T x 512 x H numbers a layer at most


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """softmax(c(scale q k') + mask) v in float32, c(s) = softcap * tanh(s / softcap) or s itself.

    The soft-cap is that of Gemma 2 (arXiv 2408.00118, section 2).

    Args:
        q: queries [R, H, Q, D].
        k, v: keys and values [R, K, N, D]; H is a multiple of K.
        mask: added to the scores, [R or 1, 1, Q, N], no gradient; None: causal, and Q is N.
        softcap: > 0, in the scores' unit; None: no soft-capping.
        scale: factor of the scores.

    Returns:
        [R, H, Q, D] in the type of q.
    """
    return Blockwise.apply(q, k, v, mask, softcap, scale)


class Blockwise(torch.autograd.Function):
    """Backward computes the probabilities again, as flash attention does, unless the rows are short."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None, scale: float):
        """`blockwise`: [R, H, Q, D] of its arguments."""
        keeps = softcap is None and q.shape[2] <= LONGEST_KEPT and any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        output = torch.empty_like(q)
        for part in parts(q, k):
            keys, values = grouped(k[part]), grouped(v[part])
            for block in blocks(q, k, part, mask):
                q_block = grouped(q[part, :, block.queries], k.shape[1])
                probabilities, _ = block.probabilities(q_block, keys, softcap, scale)
                product = torch.bmm(probabilities, values[:, : block.keys])
                output[part, :, block.queries] = product.view(-1, q.shape[1], block.size, q.shape[-1])
                if keeps:
                    kept.append(probabilities)
        ctx.save_for_backward(q, k, v, mask, *kept)
        ctx.softcap, ctx.scale = softcap, scale
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v, each in its shape."""
        # with t = tanh(scale q k' / softcap), P = softmax(softcap t), dP = g v':
        # dv = P' g,  dS = P (dP - sum over keys of P dP) (1 - t^2),  dq = scale dS k,  dk = scale dS' q;
        # without soft-capping the factor 1 - t^2 is 1
        q, k, v, mask, *kept = ctx.saved_tensors
        softcap, scale, remaining = ctx.softcap, ctx.scale, iter(kept)
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        for part in parts(q, k):
            keys, values = grouped(k[part]), grouped(v[part])
            k_gradient, v_gradient = torch.zeros_like(keys), torch.zeros_like(values)
            for block in blocks(q, k, part, mask):
                q_block, g_block = (grouped(x[part, :, block.queries], k.shape[1]) for x in (q, gradient))
                if kept:
                    probabilities, capped = next(remaining), None
                else:
                    probabilities, capped = block.probabilities(q_block, keys, softcap, scale)
                seen = slice(block.keys)
                v_gradient[:, seen].baddbmm_(probabilities.mT, g_block)
                scores = torch.bmm(g_block, values[:, seen].mT)
                scores = torch.ops.aten._softmax_backward_data(
                    scores, probabilities, -1, scores.dtype
                )  # one pass, not three
                if capped is not None:
                    scores.addcmul_(scores * capped, capped, value=-1)
                k_gradient[:, seen].baddbmm_(scores.mT, q_block, alpha=scale)
                product = torch.bmm(scores, keys[:, seen]).mul_(scale)
                gradients[0][part, :, block.queries] = product.view(-1, q.shape[1], block.size, q.shape[-1])
            gradients[1][part] = k_gradient.view_as(k[part])
            gradients[2][part] = v_gradient.view_as(v[part])
        return *gradients, None, None, None


@dataclass(frozen=True)
class Block:
    """A run of queries of some rows, with all the keys that it may see."""

    queries: slice
    size: int  # queries
    keys: int  # the first so many
    mask: Tensor  # [rows or 1, 1, 1, size, some last keys]; those before are seen by all the queries

    def probabilities(self, q: Tensor, k: Tensor, softcap: float | None, scale: float) -> tuple[Tensor, Tensor | None]:
        """Softmax over the keys, and tanh(score / softcap) if there is one, both [rows * K, H/K * queries, keys]."""
        factor = scale if softcap is None else scale / softcap
        scores = torch.baddbmm(q.new_zeros(()), q, k[:, : self.keys].mT, beta=0, alpha=factor)
        capped = None
        if softcap is not None:
            capped = scores.tanh_()
            scores = capped * softcap
        rows = self.mask.shape[0]
        by_row = scores.view(rows, len(scores) // rows, -1, self.size, self.keys)
        by_row[..., self.keys - self.mask.shape[-1] :] += self.mask
        return scores.softmax(-1), capped


def grouped(x: Tensor, key_heads: int | None = None) -> Tensor:
    """[rows * K, H/K * tokens, D] of [rows, H, tokens, D]: heads that share keys are queries side by side.

    In float32, or float64 as it comes; K is H where it is not given.
    """
    rows, heads, _, size = x.shape
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return exact.reshape(rows * (key_heads or heads), -1, size)


def parts(q: Tensor, k: Tensor) -> list[slice]:
    """Rows in as many at a time as make a block of BLOCK_SCORES; at least one.

    Args:
        q, k: [R, H, Q, D] and [R, K, N, D].

    Returns:
        Slices of the R rows, in order.
    """
    rows, heads, queries, _ = q.shape
    scores = heads * min(queries, QUERY_BLOCK[q.device.type]) * k.shape[2]
    step = max(BLOCK_SCORES[q.device.type] // scores, 1)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def blocks(q: Tensor, k: Tensor, part: slice, mask: Tensor | None) -> Iterator[Block]:
    """The blocks of queries of some rows: without their causal future, or with the mask's part.

    Args:
        q, k: [R, H, Q, D] and [R, K, N, D] of all rows.
        part: the rows; of a mask that is one for all, all of it is taken.
        mask: [R or 1, 1, Q, N]; None: causal, and Q is N.
    """
    queries, block = q.shape[2], QUERY_BLOCK[q.device.type]
    exact = torch.promote_types(q.dtype, torch.float32)
    future = torch.full((block, block), -torch.inf, dtype=exact, device=q.device).triu_(1)[None, None, None]
    for first in range(0, queries, block):
        last = min(first + block, queries)
        if mask is None:
            its_mask = future[..., : last - first, : last - first]
            yield Block(slice(first, last), last - first, last, its_mask)
        else:  # behind the last query's own key there is nothing to see
            keys = k.shape[2] - queries + last
            its_mask = mask[part] if len(mask) > 1 else mask
            yield Block(slice(first, last), last - first, keys, its_mask[:, :, None, first:last, :keys].to(exact))
