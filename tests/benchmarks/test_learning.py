"""Which claims about learning hold, on run folders written by hand."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


START = {"start": {"perplexity/code": 2000, "perplexity/web": 2048}}


@pytest.fixture(scope="module")
def learning():
    sys.path.insert(0, str(BENCHMARKS))  # as for a script of that folder
    try:
        yield importlib.import_module("learning")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def run_folder(tmp_path):
    """A run that keeps every claim, some of them just so."""
    metrics = {
        "pretrain": {"tasks/exact_match": 0, "perplexity/code": 60, "perplexity/web": 50},
        "long_context": {
            "tasks/exact_match": 0,
            "perplexity/code": 61.2,
            "perplexity/web": 50,
            "late_loss/gain": 0.01,
            "late_loss/gain_error": 0.004,
        },
        "sft": {"tasks/exact_match": 0.68, "perplexity/code": 70, "perplexity/web": 100},
        "dpo": {"tasks/exact_match": 0.65, "preference/accuracy": 0.9, "judge/win_rate_low": 0.6},
    }
    tokens = {"pretrain": 800, "long_context": 200, "sft": 300, "dpo": 100}
    for stage, count in tokens.items():
        artifact = tmp_path / "artifacts" / stage
        artifact.mkdir(parents=True)
        (artifact / "stage.json").write_text(json.dumps({"settings": {"tokens": count}}))
    record = {"recipe": "qwen2", "seed": 0, "stages": {name: {"metrics": found} for name, found in metrics.items()}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    return tmp_path


def test_a_run_that_keeps_every_claim(learning, run_folder):
    metrics = learning.read_metrics(run_folder) | START
    found = learning.summarise([metrics, metrics])
    assert [claim["claim"] for claim in found["claims"] if not claim["holds"]] == []
    assert found["stages"]["sft"]["tasks/exact_match"] == {"values": [0.68] * 2, "mean": 0.68, "standard_deviation": 0}


@pytest.mark.parametrize(
    ("stage", "metric", "value", "broken"),
    [
        ("long_context", "tasks/exact_match", 0.05, "Before any chat training"),
        ("sft", "tasks/exact_match", 0.5, "After SFT"),
        ("dpo", "tasks/exact_match", 0.648, "DPO lowers exact match"),
        ("dpo", "preference/accuracy", 0.8, "preference accuracy"),
        ("dpo", "judge/win_rate_low", 0.5, "win rate"),
        ("start", "perplexity/web", 49.0, "Pre-training lowers"),
        ("long_context", "perplexity/web", 51.1, "Long-context training raises"),
        ("long_context", "tokens", 150, "at least 20 %"),
        ("sft", "perplexity/web", 100.1, "SFT at most doubles"),
        ("long_context", "late_loss/gain", -0.001, "late tokens"),
        ("long_context", "late_loss/gain", 0.001, "in the mean of the seeds"),
    ],
)
def test_each_claim_can_fail_by_one_seed(learning, run_folder, stage, metric, value, broken):
    good, bad = (learning.read_metrics(run_folder) | START for _ in range(2))
    bad[stage] = {**bad[stage], metric: value}
    failed = [claim for claim in learning.summarise([good, bad])["claims"] if not claim["holds"]]
    assert any(broken in claim["claim"] for claim in failed)
    assert all(len(claim["values"]) == 2 for claim in failed)
