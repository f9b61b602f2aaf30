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


def test_a_teacher_costs_what_is_measured_on_a_step_of_the_same_tokens():
    import gpu
    import page

    part = gpu.distillation_part(gpu.SMALL)
    assert list(part["found"]) == ["plain", "top-1 kept", "8 kept", "64 kept", "teacher asked"]
    assert not part["refused"]
    for figures in part["found"].values():
        figures["peak_bytes"] = 2**20  # a CPU has none
    part["machine"]["gpu"] = "none"
    rows = [line for line in page.gpu_section({"distillation": part}) if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {way}" for way in part["found"]]
    assert rows[2].split(" | ")[2] == "1.000"


def test_padded_rows_in_parts_weigh_as_all_at_once():
    import tempfile

    import gpu
    import numpy as np

    size = gpu.SMALL
    model = gpu.own_model(gpu.model_config(size), size)
    lengths = gpu.mixed_lengths(size.tokens, size.long)
    texts = [np.arange(length) % 512 for length in lengths]
    assert len(texts) > size.documents  # several parts

    with tempfile.TemporaryDirectory() as folder:
        theirs = gpu.their_model(model, folder)
    batch = gpu.SegmentBatch.from_documents(texts)
    ours = gpu.step_of_ours(model, gpu.CausalLMConfig(), batch, size)("auto")
    gpu.require_equal_losses({"ours": {"loss": ours()}, "theirs": {"loss": gpu.step_of_theirs(theirs, texts, size)()}})
