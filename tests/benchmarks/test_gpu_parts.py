"""The script for one GPU, tried on what is here: every way of the vocabulary runs or says why, and losses agree."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_every_way_of_the_vocabulary_has_the_same_loss_or_a_reason():
    import gpu
    import page

    part = gpu.vocabulary_part(gpu.SMALL)
    assert {*part["found"], *part["refused"]} == set(page.GPU_VOCABULARY)
    assert {"ours", "ours_in_backward", "dense", "torch_fused"} <= set(part["found"])
    if importlib.util.find_spec("liger_kernel") is None:
        assert part["refused"] == {"liger": "ModuleNotFoundError: No module named 'liger_kernel'"}


def test_losses_that_differ_are_no_result():
    import gpu
    from interleave import Refused

    gpu.require_equal_losses({"ours": {"loss": 12.4}, "theirs": {"loss": 12.5}})
    for other in (12.6, float("nan")):
        with pytest.raises(Refused, match="losses on the same weights and data differ"):
            gpu.require_equal_losses({"ours": {"loss": 12.4}, "theirs": {"loss": other}})
