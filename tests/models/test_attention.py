"""Every attention backend against plain float64 attention: window x soft-cap x heads x prefixes x type, both ways."""

import pytest
import torch
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.models.attention import BACKENDS, Segments, attention

BATCHES = {
    "one token": SegmentBatch.from_documents([[1]]),
    "one segment": SegmentBatch.from_documents([[1] * 37]),
    "equal lengths": SegmentBatch.from_documents([[1] * 16] * 5),
    "mixed lengths": SegmentBatch.from_documents([[1] * n for n in (3, 70, 1, 9, 64, 8, 9, 33)]),
    "more than a block": SegmentBatch.from_documents([[1] * 150, [1] * 280]),
    "pairs": SegmentBatch.from_groups([[1] * 20, [1] * 3], [[[1] * 5, [1] * 9], [[1], [1] * 30]]),
    "groups": SegmentBatch.from_groups([[1] * 7, [1] * 12], [[[1] * 4] * 3, [[1] * 6]]),
    "long prompt": SegmentBatch.from_groups([[1] * 90], [[[1] * 20, [1] * 100, [1] * 3]]),
    "responses apart from their prompt": SegmentBatch.from_segments([[1] * n for n in (6, 5, 4, 8)], [-1, -1, 0, 1]),
}
HEADS = {"as many": (3, 3), "grouped": (6, 2), "one": (4, 1)}
WINDOWS = [None, 1, 5, 64, 100]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    prefixes: list[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[T, H, D] by a mask over all tokens, which is what nobody should do."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    prefix = torch.tensor(prefixes)[segment]
    position = torch.arange(len(segment)) - starts[segment]
    position += torch.tensor([lengths[p] if p >= 0 else 0 for p in prefixes])[segment]
    distance = position[:, None] - position  # in tokens of prefix and segment together
    seen = ((segment[:, None] == segment) | (prefix[:, None] == segment)) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_every_backend_is_plain_attention_forward_and_backward(batch, window, softcap, heads, dtype, backend):
    torch.manual_seed(0)
    scale = None if window is None else 0.4
    options = {"window": window, "softcap": softcap}
    inputs = [torch.randn(batch.num_tokens, n, 10, dtype=dtype, requires_grad=True) for n in (heads[0], *heads[1:] * 2)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = attention(*inputs, Segments(batch.lengths, batch.prefixes), scale=scale, backend=backend, **options)
    expected = plain_attention(*exact, batch.lengths, batch.prefixes, scale or 10**-0.5, **options)
    assert out.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)

    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    for got, wanted in zip(inputs, exact, strict=True):
        largest = wanted.grad.abs().max().item()
        torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=tolerance, atol=tolerance * max(largest, 1))
