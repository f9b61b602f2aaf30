"""DPO against TRL's trainer, call by call; writes results/dpo.json.

    python benchmarks/dpo.py [--calls 20]

Both by their trainers, in float32 on one thread, 8 pairs a step, with the reference asked in each step and with its
log-probabilities made before. Needs the peers' environments: make bench-peers.
"""

from __future__ import annotations

from pathlib import Path

import comparison
import llama
from comparison import Measured, claim
from interleave import Task, interleaved, require_equal_losses


def measure(folder: Path, calls: int) -> Measured:
    common = {
        "model": llama.write_model(folder / "model", seed=0),
        "reference": llama.write_model(folder / "reference", seed=1),  # another: equal ones would all lose log 2
        "learning_rate": 1e-4,
        "beta": 0.1,
        "pairs": llama.pairs(calls + comparison.WARM_UP),
    }
    tasks = {"ours": Task("ours", "dpo"), "trl": Task("in_trl", "dpo", "transformers")}
    asked = interleaved(tasks, common, folder, calls=calls)
    before = interleaved(tasks, {**common, "precomputed": True}, folder, calls=calls)
    for measured in (asked, before):
        require_equal_losses(measured)
    claims = [
        claim("TRL's CPU-seconds over ours, median", asked.ratios("ours", "trl")["median"], at_least=3.0),
        claim("The same, references precomputed", before.ratios("ours", "trl")["median"], at_least=2.5),
        claim("Our peak memory over TRL's", asked.memory_share("ours", "trl"), at_most=0.4),
    ]
    return {"reference asked": comparison.figures(asked), "precomputed": comparison.figures(before)}, claims


if __name__ == "__main__":
    comparison.main("dpo", str(__doc__), measure)
