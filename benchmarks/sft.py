"""Supervised fine-tuning against TRL's trainer, unpacked as it comes, call by call; writes results/sft.json.

    python benchmarks/sft.py [--calls 20]

Both by their trainers, in float32 on one thread, 8 conversations a step. Needs the peers' environments: make
bench-peers.
"""

from __future__ import annotations

from pathlib import Path

import comparison
import llama
from comparison import Measured, claim
from interleave import Task, interleaved, require_equal_losses


def measure(folder: Path, calls: int) -> Measured:
    measured = interleaved(
        {"ours": Task("ours", "sft"), "trl": Task("in_trl", "sft", "transformers")},
        {
            "model": llama.write_model(folder / "model", seed=0),
            "learning_rate": 1e-4,
            "conversations": llama.conversations(calls + comparison.WARM_UP),
        },
        folder,
        calls=calls,
    )
    require_equal_losses(measured)
    claims = [
        claim("TRL's CPU-seconds over ours, median", measured.ratios("ours", "trl")["median"], at_least=1.7),
        claim("Our peak memory over TRL's", measured.memory_share("ours", "trl"), at_most=0.5),
    ]
    return comparison.figures(measured), claims


if __name__ == "__main__":
    comparison.main("sft", str(__doc__), measure)
