"""The comparisons' harness on real workers: the same work, in turns, and nothing timed that is not the same."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"tokens": 48, "width": 16, "vocabulary": 300}


@pytest.fixture(scope="module")
def scripts():
    """`scripts(name)` -> a module of benchmarks/."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_workers_do_the_same_work_in_turns(scripts, tmp_path):
    interleave = scripts("interleave")
    tasks = {"ours": interleave.Task("ours", "vocabulary"), "dense": interleave.Task("in_torch", "dense")}
    measured = interleave.interleaved(tasks, SIZES, tmp_path, calls=3, warm_up=1)
    losses = interleave.require_equal_losses(measured)
    assert losses["ours"] == pytest.approx(losses["dense"], abs=1e-5)
    for ours, dense in zip(measured.calls["ours"], measured.calls["dense"], strict=True):
        assert ours["gradients"] == pytest.approx(dense["gradients"], rel=1e-4)
    figures = scripts("comparison").figures(measured)
    assert figures["dense"]["cpu_ratio_to_ours"]["lower_quartile"] > 0
    assert figures["ours"]["cpu_seconds"]["median"] > 0
    assert "torch" in figures["ours"]["versions"]
    measured.warm_up["dense"][0]["loss"] += 1e-3
    with pytest.raises(interleave.Refused, match="losses on the same weights and data differ"):
        interleave.require_equal_losses(measured)


def test_a_worker_that_fails_says_why(scripts, tmp_path):
    interleave = scripts("interleave")
    with pytest.raises(interleave.Refused, match="KeyError: 'vocabulary'"):
        interleave.interleaved(
            {"dense": interleave.Task("in_torch", "dense")}, {"tokens": 4, "width": 4}, tmp_path, calls=2, warm_up=0
        )


def test_claims_have_bounds(scripts):
    claim = scripts("comparison").claim
    assert claim("faster", 1.2, at_least=1.05)["holds"]
    assert not claim("faster", 1.0, at_least=1.05)["holds"]
    assert not claim("smaller", 0.6, at_most=0.5)["holds"]


def test_the_page_says_what_the_results_say(scripts):
    """`python benchmarks/page.py` was run after the last measurement."""
    page = scripts("page")
    assert (page.DOCS / "performance.md").read_text() == page.text()
    for name in page.results():
        assert (page.DOCS / page.picture_of(name)).is_file()


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "data", "peers"),
    [
        ("pretrain", {"documents": "full_rows"}, {"in_litgpt": "litgpt", "in_transformers": "transformers"}),
        ("pretrain", {"documents": "mixed_documents"}, {"in_transformers": "transformers"}),
        ("sft", {"conversations": "conversations"}, {"in_trl": "transformers"}),
        ("dpo", {"pairs": "pairs"}, {"in_trl": "transformers"}),
    ],
    ids=["full rows", "padded rows", "sft", "dpo"],
)
def test_the_losses_are_the_peers(job, data, peers, scripts, tmp_path):
    """To 1e-4 on the same weights and data: `require_equal_losses` refuses more."""
    interleave, llama, lacks = scripts("interleave"), scripts("llama"), scripts("peers.environments").lacks
    for peer in peers.values():
        if reason := lacks(peer):
            pytest.skip(reason)
    tasks = {script: interleave.Task(script, job, peer) for script, peer in peers.items()}
    tasks["ours"] = interleave.Task("ours", job)
    settings = {
        "model": llama.write_model(tmp_path / "model", seed=0),
        "reference": llama.write_model(tmp_path / "reference", seed=1),
        "learning_rate": 1e-4,
        "beta": 0.1,
        **{name: getattr(llama, made)(3) for name, made in data.items()},
    }
    measured = interleave.interleaved(tasks, json.loads(json.dumps(settings)), tmp_path, calls=2, warm_up=1)
    assert len(interleave.require_equal_losses(measured)) == len(tasks)
