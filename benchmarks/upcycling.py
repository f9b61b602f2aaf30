"""Is a mixture of experts that is made of a trained dense model a better beginning than random weights? At equal tokens
after the dense model, per seed: expert slices with half of them drawn anew, slices as they are, whole copies, the dense
model trained on, and a mixture from scratch. Writes results/upcycling.json and docs/images/upcycling.svg.

    python benchmarks/upcycling.py [--seeds 0 1 2] [--jobs 4] [overrides ...]

All arms of a seed share data and dense model, which the store holds.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import claims
import figures
import trials

from lightning_llm.models.families import read_config
from lightning_llm.models.size import parameter_counts

RESULT = claims.RESULTS / "upcycling.json"
PICTURE = figures.IMAGES / "upcycling.svg"
STAGE = "mixture"  # the one that is compared
COPIES = ["experts=copies", "moe_intermediate_size=null", "shared_expert_intermediate_size=null"]
ARMS = {  # arm -> what is typed
    "from scratch": [f"stages.{STAGE}.starts_from=null", f"+model@stages.{STAGE}.model=qwen2_57b_a14b"],
    "slices, half drawn anew": [],
    "slices as they are": ["stages.upcycle.reinitialised=0"],
    "whole copies": [f"stages.upcycle.{word}" for word in COPIES],
    "dense, trained on": [f"stages.{STAGE}.starts_from=pretrain"],
}
BASELINE, UPCYCLED = "from scratch", "slices, half drawn anew"
BESIDE = (f"stages.{STAGE}.evaluate=false", "stages.upcycle.evaluate=false", "stages.pretrain.evaluate=false")


def train(seed: int, arm: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One arm's held-out loss on its way, parameters and seconds; and where the dense model has ended."""
    words = ("recipe=upcycling", f"seed={seed}", f"until={STAGE}", *BESIDE)
    artifacts = trials.run(*words, *ARMS[arm], *overrides) / "artifacts"
    record = trials.read(artifacts / STAGE / "stage.json")
    sizes = parameter_counts(read_config(artifacts / STAGE / "model"))
    found = {
        "curve": trials.validation_curve(artifacts / STAGE),
        "parameters": {name: sizes[name] for name in ("total", "active")},
        "seconds": record["seconds"]["total"],
    }
    if (artifacts / "pretrain").exists():
        found["dense"] = trials.validation_curve(artifacts / "pretrain")[-1][1]
    print(f"seed {seed}, {arm}: {found['curve'][0][1]:.3f} -> {found['curve'][-1][1]:.3f}", flush=True)
    return found


def measure(arguments: Namespace) -> trials.Result:
    """The result."""
    return summarise(trials.of_arms(train, ARMS, arguments))


def summarise(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Losses of all arms with their spread, what each gains over the baseline within its seed, and what is claimed.

    Args:
        found: arm -> what `train` says of each seed.
    """
    ends = {arm: [run["curve"][-1][1] for run in runs] for arm, runs in found.items()}
    arms = {}
    for arm, runs in found.items():
        arms[arm] = {
            **trials.mean_curve([run["curve"] for run in runs]),
            "before": trials.spread([run["curve"][0][1] for run in runs]),
            "after": trials.spread(ends[arm]),
            "gain": trials.spread(trials.differences(ends[BASELINE], ends[arm])),
            "parameters": runs[0]["parameters"],
            "seconds": trials.spread([run["seconds"] for run in runs]),
        }
    says = "An upcycled mixture is below one from random weights at equal tokens (held-out nats per token)"
    return {
        "claims": [claims.worst(says, arms[UPCYCLED]["gain"]["values"], above=0.0)],
        "dense": trials.spread([run["dense"] for run in found[UPCYCLED]]),
        "arms": arms,
    }


# ---- what docs/methods/upcycling.md shows ----


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of arms: held-out nats before and after, mean and standard deviation over the seeds."""
    head = ["model", "parameters", "active", "nats before", "nats after", f"below `{BASELINE}`", "by seed"]
    rows = [
        [
            arm,
            *(f"{found['parameters'][name] / 1e6:.2f}M" for name in ("total", "active")),
            figures.shown(found["before"]),
            figures.shown(found["after"]),
            figures.shown(found["gain"], signed=True) if arm != BASELINE else "",
            figures.by_seed(found["gain"]) if arm != BASELINE else "",
        ]
        for arm, found in result["arms"].items()
    ]
    return figures.lines_of_table(head, rows)


def draw(result: Mapping[str, Any]) -> None:
    """Held-out loss over the tokens that every arm sees, the mean of the seeds, with a dot a seed at its end."""
    before = ("the dense model before", result["dense"]["mean"])
    figures.draw_curves(PICTURE, result["arms"], before, "tokens after the dense model")


if __name__ == "__main__":
    trials.publish(__doc__, RESULT, measure, table, draw)
