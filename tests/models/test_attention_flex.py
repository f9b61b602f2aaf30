"""FlexAttention as it is compiled: each kind of layer by itself, for batches of any shape, or not at all."""

import warnings

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._dynamo.utils import counters

from lightning_llm.models.attention import Segments
from lightning_llm.models.attention.flex import block_mask, kernel, soft_capping, uncompiled

# what torch's tracer and its imports do to themselves
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]
CPU = torch.device("cpu")
SHAPES = ([40, 60], [100, 33, 7], [12, 300], [5], [600], [77] * 9, [1])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    kernel.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()
    kernel.cache_clear()


def kind_of(window, softcap, heads=(4, 2), dtype=torch.float32):
    """Its kernel, traced and not compiled."""
    return kernel(window, softcap, 0.25, heads, dtype, backend="eager")


def call(attend, lengths, window, softcap, heads=(4, 2), dtype=torch.float32):
    segments = Segments(lengths, [-1] * len(lengths))
    generator = torch.Generator().manual_seed(sum(lengths))
    q, k, v = (torch.randn(1, n, sum(lengths), 16, generator=generator).to(dtype) for n in (heads[0], *2 * heads[1:]))
    mask = block_mask(segments, window, CPU)
    mod = None if softcap is None else soft_capping(softcap, CPU)
    with torch.no_grad():
        return attend(q, k, v, score_mod=mod, block_mask=mask, scale=0.25, enable_gqa=heads[0] != heads[1])


@pytest.mark.slow
def test_every_kind_of_layer_keeps_its_own_graphs_over_all_shapes():
    """Four kinds and seven shapes: by the one limit of eight they would share, some would run uncompiled.

    Traced and cached by torch's own tracer, without code for a device.
    """
    kinds = [(None, None), (3, None), (None, 30.0), (200, 50.0)]
    traced = {}
    for kind in kinds:
        before = counters["stats"]["unique_graphs"]
        traced[kind] = [call(kind_of(*kind), lengths, *kind) for lengths in SHAPES]
        assert 1 <= counters["stats"]["unique_graphs"] - before <= 3  # one tile, several; a single token
    assert not counters["graph_break"]
    for kind, outputs in traced.items():
        for lengths, got in zip(SHAPES, outputs, strict=True):
            torch.testing.assert_close(got, call(uncompiled, lengths, *kind), rtol=1e-5, atol=1e-5)


def test_models_of_other_heads_and_types_share_no_limit():
    """A policy, what judges it, and a teacher in one process: nine graphs of one window."""
    for heads, dtype in (((3, 3), torch.float32), ((6, 2), torch.float32), ((6, 2), torch.bfloat16)):
        for lengths in ([40, 60], [600], [1]):
            call(kind_of(5, None, heads, dtype), lengths, 5, None, heads, dtype)
    assert counters["stats"]["unique_graphs"] > 8
    assert not counters["graph_break"]


def test_beyond_the_limit_is_an_error_and_not_an_uncompiled_kernel():
    attend = kind_of(None, None)
    call(attend, [140], None, None)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(FailOnRecompileLimitHit):
        call(attend, [140], None, 30.0)
    with pytest.raises(Unsupported):  # and so is what cannot be traced
        call(leaving(kind_of(3, None)), [140], 3, None)


def leaving(attend):
    """`attend` with a score function that leaves the graph."""

    def untraceable(score, row, head, query, key):
        torch._dynamo.graph_break()
        return score

    return lambda *inputs, **options: attend(*inputs, **options | {"score_mod": untraceable})


def test_on_a_cpu_its_warning_is_not_passed_on(monkeypatch):
    monkeypatch.setattr(
        "torch.nn.attention.flex_attention._WARNINGS_SHOWN", set(), raising=False
    )  # it is given once in a process
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(uncompiled, [5, 6], None, None)
