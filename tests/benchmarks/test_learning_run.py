"""The untrained model of a real run, on the text of its evaluation."""

import importlib
import math
import sys
from pathlib import Path


def test_random_weights_know_next_to_nothing(run_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    learning = importlib.import_module("learning")
    start, trained = learning.untrained_perplexities(run_folder), learning.read_metrics(run_folder)["pretrain"]
    assert start.keys() == {"perplexity/code", "perplexity/web"}
    for name, value in start.items():
        assert math.isclose(value, 512, rel_tol=0.2)  # about as many as there are entries
        assert trained[name] < value
    sys.modules.pop("learning")
