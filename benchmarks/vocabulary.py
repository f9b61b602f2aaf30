"""The vocabulary function against dense logits, torch's own and Liger's; writes results/vocabulary.json.

    python benchmarks/vocabulary.py [--calls 5]

2,048 tokens of width 256 in float32 on one thread, for vocabularies of 8,192 to 262,144. Needs the peers' environments
for Liger's: make bench-peers; where a method cannot run, the file says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comparison
from comparison import Measured, claim
from interleave import Refused, Task, interleaved, require_equal_losses
from peers.environments import lacks

VOCABULARIES = (8192, 32_768, 131_072, 262_144)


def liger(settings: dict[str, Any], folder: Path) -> str | None:
    """Why Liger's kernel cannot run here; None: it can."""
    if reason := lacks("liger"):
        return reason
    try:
        interleaved({"liger": Task("in_liger", "vocabulary", "liger")}, settings, folder, calls=2, warm_up=1)
    except Refused as error:
        return str(error).splitlines()[0]
    return None


def measure(folder: Path, calls: int) -> Measured:
    tasks = {
        "ours": Task("ours", "vocabulary"),
        "ours, gradient in backward": Task("ours", "vocabulary", settings={"in_backward": True}),
        "dense": Task("in_torch", "dense"),
        "torch's linear_cross_entropy": Task("in_torch", "fused"),
    }
    common = {"tokens": 2048, "width": 256}
    reason = liger({**common, "vocabulary": VOCABULARIES[0]}, folder)
    if reason is None:
        tasks["liger"] = Task("in_liger", "vocabulary", "liger")
    found: dict[str, Any] = {"liger": reason or "runs"}
    claims = []
    for size in VOCABULARIES:
        measured = interleaved(tasks, {**common, "vocabulary": size}, folder, calls=calls, warm_up=1)
        require_equal_losses(measured)
        found[f"V = {size:,}"] = comparison.figures(measured)
        faster = measured.ratios("ours", "dense")["median"]
        claims.append(claim(f"V = {size:,}: dense CPU-seconds over ours", faster, at_least=1.0))
        claims.append(
            claim(f"V = {size:,}: our memory over dense", measured.memory_share("ours", "dense"), at_most=1.0)
        )
    return found, claims


if __name__ == "__main__":
    comparison.main("vocabulary", str(__doc__), measure)
