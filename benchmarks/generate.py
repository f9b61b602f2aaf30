"""Sampling against transformers' `generate`, in tokens per CPU-second; writes results/generate.json.

    python benchmarks/generate.py [batch samples mixed]

Drawn at temperature 1 from the whole distribution, prompts of 160 tokens, on the same weights, call by call in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import claims
import machine
import workload
from interleave import Task, interleaved

CALLS, WARM_UP = 8, 1
PLACES = 32
TASKS = {"ours": Task("ours", "generate"), "transformers": Task("in_transformers", "generate", "transformers")}


def batch() -> tuple[dict[str, Any], str, float]:
    """32 prompts, 64 tokens each."""
    return {"limits": [[64] * 32] * (CALLS + WARM_UP), "samples": 1}, "32 prompts, 64 tokens each", 1.5


def samples() -> tuple[dict[str, Any], str, float]:
    """8 prompts with 8 samples of 64 tokens each."""
    return {"limits": [[64] * 64] * (CALLS + WARM_UP), "samples": 8}, "8 prompts, 8 samples of 64 tokens each", 2.0


def mixed() -> tuple[dict[str, Any], str, float]:
    """128 prompts with responses of 8 to 128 tokens, in 32 places."""
    limits = workload.response_lengths(CALLS + WARM_UP, rows=4 * PLACES)
    return {"limits": limits, "samples": 1}, f"128 responses of 8 to 128 tokens, {PLACES} places", 2.5


def measure(settings: dict[str, Any], says: str, at_least: float, folder: Path) -> dict[str, Any]:
    limits = settings["limits"]
    rows = len(limits[0]) // settings["samples"]
    given = {
        "model": workload.save_model(folder / "model", seed=0),
        "prompts": workload.full_rows(len(limits), rows=rows, length=160),
        "places": PLACES if settings["samples"] == 1 else len(limits[0]),
        **settings,
    }
    found = interleaved(TASKS, given, folder, calls=CALLS, warm_up=WARM_UP)
    for worker, answers in found.warm_up.items():  # what is timed has to be the same work
        assert answers[0]["tokens"] == sum(limits[0]), worker
    ratio = found.ratios("ours", "transformers")
    return {
        "machine": machine.describe(),
        "claims": [
            claims.claim(f"{says}: times transformers' rate, median", ratio["median"], at_least=at_least),
            claims.claim(f"{says}: the aim", ratio["median"], at_least=2 * at_least),
        ],
        "tokens_per_call": sum(map(sum, limits[WARM_UP:])) / CALLS,
        "workers": {name: found.figures(name) for name in found.calls},
        "ratios": {"transformers": ratio},
    }


PARTS = {part.__name__: part for part in (batch, samples, mixed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    verdicts = []
    for name in parser.parse_args().parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            verdicts.append(claims.write_part("generate", name, measure(*PARTS[name](), Path(folder))))
    claims.finish(verdicts)


if __name__ == "__main__":
    main()
