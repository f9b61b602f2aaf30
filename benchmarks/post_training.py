"""One measurement of post-training against TRL's trainer: what the benchmarks of SFT, DPO and reward models share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import machine
import workload
from interleave import Measurement, Task, interleaved, require_equal_losses

CALLS, WARM_UP = 20, 3


def measure(job: str, settings: dict[str, Any], folder: Path) -> Measurement:
    """Ours through Lightning's loop and TRL's trainer, each from the making of a batch to the end of its step."""
    common = {
        "model": workload.save_model(folder / "model", seed=0),
        "reference": workload.save_model(folder / "reference", seed=1),
        "learning_rate": workload.LEARNING_RATE,
        **settings,
    }
    tasks = {"ours": Task("ours", job), "trl": Task("in_trl", job, "transformers")}
    return interleaved(tasks, common, folder, calls=CALLS, warm_up=WARM_UP)


def report(found: Measurement, judged: list[dict[str, Any]], **figures: Any) -> dict[str, Any]:
    return {
        "machine": machine.describe(),
        "claims": judged,
        **figures,
        "losses": require_equal_losses(found),
        "workers": {name: found.figures(name) for name in found.calls},
        "ratios": {"trl": found.ratios("ours", "trl")},
    }
