"""Pre-training against LitGPT's model and transformers' in a plain loop; writes results/pretrain.json.

    python benchmarks/pretrain.py [full_rows compiled mixed lightning]

Useful tokens per CPU-second, all on the same weights and tokens, one thread each, call by call in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import claims
import machine
import workload
from interleave import Measurement, Task, interleaved, require_equal_losses

CALLS, WARM_UP = 20, 3
OURS = Task("ours", "pretrain")
LITGPT = Task("in_litgpt", "pretrain", "litgpt")
TRANSFORMERS = Task("in_transformers", "pretrain", "transformers")
COMPILED = {"compile": True}


def measure(tasks: dict[str, Task], documents: list[list[workload.Tokens]], folder: Path) -> Measurement:
    settings = {
        "model": workload.save_model(folder / "model", seed=0),
        "documents": documents,
        "learning_rate": workload.LEARNING_RATE,
        "products": workload.products(),
    }
    return interleaved(tasks, settings, folder, calls=CALLS, warm_up=WARM_UP)


def against_better(measurement: Measurement, says: str) -> list[dict[str, Any]]:
    """Claims against the peer that took less time."""
    better = min(("litgpt", "transformers"), key=lambda name: measurement.figures(name)["cpu_seconds"]["median"])
    ratio = measurement.ratios("ours", better)
    return [
        claims.claim(f"{says}: times the rate of the better ({better}), median", ratio["median"], at_least=1.05),
        claims.claim(f"{says}: lower quartile of the same", ratio["lower_quartile"], above=1.0),
        claims.claim(f"{says}: the aim", ratio["median"], at_least=1.25),
    ]


def share_of_limit(measurement: Measurement, flops: float) -> float:
    """Our FLOPs a second over those of matrix products of the same shapes, measured in between."""
    pairs = zip(measurement.calls["ours"], measurement.calls["limit"], strict=True)
    return statistics.median((flops / our["cpu"]) / (best["flops"] / best["cpu"]) for our, best in pairs)


def full_rows(folder: Path) -> dict[str, Any]:
    documents = workload.full_rows(CALLS + WARM_UP)
    tasks = {"ours": OURS, "litgpt": LITGPT, "transformers": TRANSFORMERS, "limit": Task("ours", "limit")}
    found = measure(tasks, documents, folder)
    share = share_of_limit(found, workload.step_flops(documents[0]))
    return report(
        found,
        documents,
        [
            *against_better(found, "Full rows, eager"),
            claims.claim("Full rows: share of the machine's matrix-product limit", share, at_least=0.55),
        ],
    )


def compiled(folder: Path) -> dict[str, Any]:
    documents = workload.full_rows(CALLS + WARM_UP)
    tasks = {
        name: Task(task.script, task.job, task.peer, COMPILED)
        for name, task in (("ours", OURS), ("litgpt", LITGPT), ("transformers", TRANSFORMERS))
    }
    found = measure(tasks, documents, folder)
    return report(found, documents, against_better(found, "Full rows, compiled"))


def mixed(folder: Path) -> dict[str, Any]:
    documents = workload.mixed_documents(CALLS + WARM_UP)
    found = measure({"ours": OURS, "transformers": TRANSFORMERS}, documents, folder)
    ratio = found.ratios("ours", "transformers")
    says = "Documents of 32 to 512 tokens: times the rate of transformers padded, median"
    return report(found, documents, [claims.claim(says, ratio["median"], at_least=1.5)])


def lightning(folder: Path) -> dict[str, Any]:
    documents = workload.full_rows(CALLS + WARM_UP)
    found = measure({"ours": OURS, "lightning": Task("ours", "pretrain_with_lightning")}, documents, folder)
    cost = found.ratios("ours", "lightning")["median"] - 1
    return report(found, documents, [claims.claim("Cost of Lightning's loop over a bare one", cost, at_most=0.03)])


def report(found: Measurement, documents: list[list[workload.Tokens]], judged: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = statistics.fmean(sum(map(len, batch)) for batch in documents)
    return {
        "machine": machine.describe(),
        "claims": judged,
        "useful_tokens_per_call": tokens,
        "losses": require_equal_losses(found),
        "workers": {name: found.figures(name) for name in found.calls},
        "ratios": {name: found.ratios("ours", name) for name in found.calls if name not in ("ours", "limit")},
    }


PARTS = {part.__name__: part for part in (full_rows, compiled, mixed, lightning)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    verdicts = []
    for name in parser.parse_args().parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            verdicts.append(claims.write_part("pretrain", name, PARTS[name](Path(folder))))
    claims.finish(verdicts)


if __name__ == "__main__":
    main()
