"""Every attention backend against a plain float64 reference; what stacking costs; what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import attention as attention_module
from lightning_llm.models.attention import BACKENDS, CALL_COST, Segments, attention, fill_buckets
from lightning_llm.settings import UserError

BATCHES = {
    "one token": SegmentBatch.from_documents([[1]]),
    "one segment": SegmentBatch.from_documents([[1] * 37]),
    "equal lengths": SegmentBatch.from_documents([[1] * 16] * 5),
    "mixed lengths": SegmentBatch.from_documents([[1] * n for n in (3, 70, 1, 9, 64, 8, 9, 33)]),
    "pairs": SegmentBatch.from_groups([[1] * 20, [1] * 3], [[[1] * 5, [1] * 9], [[1], [1] * 30]]),
    "groups": SegmentBatch.from_groups([[1] * 7, [1] * 12], [[[1] * 4] * 3, [[1] * 6]]),
    "responses apart from their prompt": SegmentBatch.from_segments([[1] * n for n in (6, 5, 4, 8)], [-1, -1, 0, 1]),
}
HEADS = {"as many": (3, 3), "grouped": (6, 2), "one": (4, 1)}


def plain_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], prefixes: list[int], scale: float) -> Tensor:
    """[T, H, D] by a mask over all tokens, which is what nobody should do."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    prefix = torch.tensor(prefixes)[segment]
    token = torch.arange(len(segment))
    seen = (segment[:, None] == segment) & (token[:, None] >= token) | (prefix[:, None] == segment)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_every_backend_is_plain_attention_forward_and_backward(batch, scale, heads, backend):
    torch.manual_seed(0)
    inputs = [torch.randn(batch.num_tokens, count, 10, requires_grad=True) for count in (heads[0], heads[1], heads[1])]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = attention(*inputs, Segments(batch.lengths, batch.prefixes), scale=scale, backend=backend)
    expected = plain_attention(*exact, batch.lengths, batch.prefixes, scale or 10**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)

    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    for got, wanted in zip(inputs, exact, strict=True):
        torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_stacking_never_costs_more_than_a_loop_over_segments(data):
    groups = data.draw(st.lists(st.tuples(st.integers(1, 300), st.lists(st.integers(1, 80), max_size=3)), min_size=1))
    lengths, prefixes, pairs = [], [], 0
    for prompt, responses in groups:
        prefixes += [-1] + [len(lengths)] * len(responses)
        lengths += [prompt, *responses]
        pairs += prompt**2 + sum(n * (n + prompt) for n in responses)
        pairs += responses[0] * prompt if responses else 0  # prompt and first response are one square
    buckets = fill_buckets(Segments(lengths, prefixes), torch.zeros(0))
    calls = zip(buckets.buckets, buckets.query_sizes, buckets.key_sizes, strict=True)
    cost = sum(queries * (keys // call.rows) for call, queries, keys in calls)
    assert cost + CALL_COST * len(buckets.buckets) <= pairs + CALL_COST * len(lengths)


def test_a_like_length_costs_one_call_and_no_copy():
    buckets = fill_buckets(Segments([128] * 16, [-1] * 16), torch.zeros(0))
    assert [call.rows for call in buckets.buckets] == [16]
    assert buckets.inverse is None


def test_the_calls_of_a_batch_are_chosen_once(monkeypatch):
    chosen = []
    monkeypatch.setattr(attention_module, "fill_buckets", lambda *x: chosen.append(x) or fill_buckets(*x))
    segments = Segments([4, 2], [-1, 0])
    for _ in range(3):
        attention(torch.randn(6, 2, 4), torch.randn(6, 1, 4), torch.randn(6, 1, 4), segments)
    assert len(chosen) == 1
    np.testing.assert_array_equal(segments.starts, [0, 4])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window": 4}, "sdpa has no sliding window yet"),
        ({"softcap": 50.0}, "sdpa has no soft-capping yet"),
        ({"backend": "sdpa", "window": 4}, "sdpa has no sliding window yet"),
        ({"backend": "flash"}, "'flash' is not a backend"),
    ],
)
def test_what_no_backend_does_is_refused(options, reason):
    q, k = torch.randn(6, 2, 4), torch.randn(6, 1, 4)
    with pytest.raises(UserError, match=reason):
        attention(q, k, k, Segments([6], [-1]), **options)
