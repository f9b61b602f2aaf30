"""The backend `sdpa`: torch's scaled_dot_product_attention for stacked rows; runs everywhere, does everything."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_llm.models.attention.blockwise import LONGEST_KEPT, blockwise_attention
from lightning_llm.models.attention.request import Request
from lightning_llm.models.attention.rows import Call, fill_calls
from lightning_llm.models.attention.segments import Segments


class Sdpa:
    """Rows of like length are stacked, so that many short ones take few calls, and padded.

    On the right the padding lies in the causal future of all real queries and changes nothing; on the left, before a
    row's keys, it is masked. Soft-capping, which torch's function has not, and short rows on a CPU, where it is slower,
    are computed in blockwise.py.
    """

    def refuses(self, request: Request) -> str | None:
        """Nothing: it runs everywhere and can do everything."""
        return None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        *,
        window: int | None,
        softcap: float | None,
        scale: float,
    ) -> Tensor:
        """[T, H, D] of q [T, H, D], k and v [T, K, D]; see `attention`."""
        key = ("rows", window, q.device, q.dtype)
        calls = segments.derive(key, lambda: fill_calls(segments, window, q))
        if calls.inverse is not None:
            q = q.index_select(0, calls.query_index)
            k, v = k.index_select(0, calls.key_index), v.index_select(0, calls.key_index)
        query_sizes = [call.rows * call.queries for call in calls.calls]
        key_sizes = [call.rows * call.keys for call in calls.calls]
        outputs = [
            attend_rows(call, *qkv, softcap=softcap, scale=scale)
            for call, qkv in zip(
                calls.calls,
                zip(q.split(query_sizes), k.split(key_sizes), v.split(key_sizes), strict=True),
                strict=True,
            )
        ]
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return output if calls.inverse is None else output.index_select(0, calls.inverse)


def attend_rows(call: Call, q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None, scale: float) -> Tensor:
    """One call: queries [rows * queries, H, D], keys and values [rows * keys, K, D] -> as the queries."""
    q, k, v = (x.unflatten(0, (call.rows, -1)).transpose(1, 2) for x in (q, k, v))  # [rows, heads, tokens, D]
    is_short = q.is_cpu and q.dtype == torch.float32 and q.shape[2] <= LONGEST_KEPT
    if softcap is not None or is_short:
        output = blockwise_attention(q, k, v, call.mask, softcap, scale)
    else:
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=call.mask, is_causal=call.mask is None, scale=scale, enable_gqa=True
        )
    return output.transpose(1, 2).flatten(0, 1)
