"""Every attention backend against plain float64 attention: window x soft-cap x heads x prefixes x type, both ways."""

import pytest
import torch
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.models.attention import BACKENDS, Request, Segments, attention, capability

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
TOLERANCES = {("cpu", torch.float32): 1e-5, ("cuda", torch.float32): 1e-4}  # bfloat16: 2e-2
HEAD_SIZES = {"cpu": 10, "cuda": 32}  # the kernels of GPUs want multiples of 8, of 16 or more


def runs(names: dict[str, tuple[str, ...]]) -> list:
    """(device, backend) as parameters; those on a GPU are marked."""
    on_gpu = (pytest.mark.gpu, pytest.mark.filterwarnings("default"))  # what compiles flex warns on its own account
    marks = {"cpu": (), "cuda": on_gpu}
    return [
        pytest.param(device, name, id=f"{device}-{name}", marks=marks[device])
        for device, backends in names.items()
        for name in backends
    ]


def skip_what_cannot_run(
    device: str, backend: str, dtype: torch.dtype, softcap: float | None, size: int | None = None, **options
) -> None:
    """Skip, saying what is missing; on a GPU only for what the backend never does or what is not installed."""
    gpu = capability(torch.device(device))
    request = Request(device, dtype, size or HEAD_SIZES[device], softcap=softcap, capability=gpu, **options)
    if (reason := BACKENDS[backend].refuses(request)) is not None:
        pytest.skip(f"{backend} {reason}")


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


MACHINES = {"cpu": ("sdpa", "flex"), "cuda": tuple(BACKENDS)}  # the other two want a GPU: test_attention_choice.py
CASES = [  # flex on a CPU, which takes 50 ms a case there, in one type; in the other its heads of 256
    pytest.param(dtype, *run.values, id=f"{dtype}-{run.id}", marks=run.marks)
    for run in runs(MACHINES)
    for dtype in (torch.float32, torch.bfloat16)
    if (*run.values, dtype) != ("cpu", "flex", torch.bfloat16)
]


@pytest.mark.parametrize(("dtype", "device", "backend"), CASES)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_every_backend_is_plain_attention_forward_and_backward(batch, window, softcap, heads, dtype, device, backend):
    """Forward alone where a backend has no gradient: flex on a CPU."""
    scale = None if window is None else 0.4
    compare_with_plain(batch, window, softcap, scale, heads, HEAD_SIZES[device], dtype, device, backend)


@pytest.mark.parametrize(("device", "backend"), runs(MACHINES))
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("name", ["mixed lengths", "pairs", "long prompt"])
def test_heads_of_256_with_a_soft_cap_as_gemma_2_has_them(name, window, device, backend):
    compare_with_plain(BATCHES[name], window, 50.0, None, HEADS["grouped"], 256, torch.bfloat16, device, backend)


def compare_with_plain(
    batch: SegmentBatch,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    device: str,
    backend: str,
) -> None:
    """One backend's attention and its gradients beside those of `plain_attention` in float64; or skipped."""
    has_gradient = (device, backend) != ("cpu", "flex")
    skip_what_cannot_run(device, backend, dtype, softcap, size, needs_gradient=has_gradient)
    inputs, exact = inputs_of(batch, heads, size, dtype)
    options = {"window": window, "softcap": softcap}
    moved = [x.detach().to(device).requires_grad_(has_gradient) for x in inputs]
    out = attention(*moved, Segments(batch.lengths, batch.prefixes), scale=scale, backend=backend, **options)
    expected = plain_attention(*exact, batch.lengths, batch.prefixes, scale or size**-0.5, **options)
    assert out.dtype == dtype
    tolerance = TOLERANCES.get((device, dtype), 2e-2)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    if not has_gradient:
        return

    upstream = torch.randn_like(expected).to(dtype)
    out.backward(upstream.to(device))
    expected.backward(upstream.double())
    for got, wanted in zip(moved, exact, strict=True):
        largest = max(wanted.grad.abs().max().item(), 1.0)
        torch.testing.assert_close(got.grad.cpu().double(), wanted.grad, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize(
    ("device", "backend"), runs({"cpu": ("sdpa", "flex"), "cuda": ("sdpa", "flex", "varlen", "flash")})
)
def test_a_window_counts_the_query_itself_and_reaches_into_the_prefix(device, backend):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    skip_what_cannot_run(device, backend, dtype, None, needs_gradient=False)
    segments = Segments([5, 3, 4], [-1, 0, 0])
    q, k = torch.zeros(12, 1, 16, device=device, dtype=dtype), torch.zeros(12, 1, 16, device=device, dtype=dtype)
    v = torch.eye(12, 16, device=device, dtype=dtype).unsqueeze(1)  # so the output says which keys were seen
    with torch.no_grad():
        out = attention(q, k, v, segments, window=3, backend=backend)[:, 0].cpu()
    seen = [row.nonzero().flatten().tolist() for row in out]
    prompt = [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert seen == [*prompt, [3, 4, 5], [4, 5, 6], [5, 6, 7], [3, 4, 8], [4, 8, 9], [8, 9, 10], [9, 10, 11]]


def inputs_of(batch: SegmentBatch, heads: tuple[int, int], size: int, dtype: torch.dtype) -> tuple[list, list]:
    """Queries, keys and values of a batch, and the same in float64."""
    torch.manual_seed(0)
    inputs = [torch.randn(batch.num_tokens, count, size, dtype=dtype) for count in (heads[0], heads[1], heads[1])]
    return inputs, [x.double().requires_grad_() for x in inputs]
