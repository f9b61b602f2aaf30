"""Is a pruned model a better beginning than random weights? AFM's claim, at equal tokens of the small model: pruned by
magnitudes, by activations and by learnt masks, against from scratch, and with the parent as teacher, per seed. Writes
results/pruning.json and docs/images/pruning.svg.

    python benchmarks/pruning.py [--seeds 0 1 2] [--jobs 4] [overrides ...]

All arms of a seed share the parent, which the store holds.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import claims
import figures
import held_out_text
import trials
from trials import differences, spread

RESULT = claims.RESULTS / "pruning.json"
PICTURE = figures.IMAGES / "pruning.svg"
PLAIN = ["stages.core.learns_from=null", "objective@stages.core.objective=causal_lm"]
RANDOM = ["stages.core.starts_from=null", "+model@stages.core.model=afm_on_device"]
RANDOM += ["stages.core.model.intermediate_size=120"]  # as many as are left of 352
FROM_PARENT = ["stages.prune.starts_from=parent"]
ARMS = {  # arm -> what is typed
    "from scratch": [*PLAIN, *RANDOM],
    "magnitude": [*PLAIN, *FROM_PARENT, "prune@stages.prune.method=magnitude"],
    "activation": [*PLAIN, *FROM_PARENT, "prune@stages.prune.method=activation"],
    "learnt masks": PLAIN,
    "from scratch, distilled": RANDOM,
    "learnt masks, distilled": [],
}
BASELINE = "from scratch"
STAGES = ("parent", "masks", "prune", "core.teacher", "core")


def measure(arguments: Namespace) -> trials.Result:
    """The result."""
    return {"recipe": "pruning", "scale": "nano", **summarise(trials.of_arms(train, ARMS, arguments))}


def train(seed: int, arm: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What one arm has left."""
    return read(trials.run("recipe=pruning", f"seed={seed}", "until=core", *ARMS[arm], *overrides))


def read(folder: Path) -> dict[str, Any]:
    """Of each stage that a run has: held-out loss on its way [(tokens, nats per token)], and what it cost; of the
    small model the share of held-out tokens that it finds likeliest."""
    found: dict[str, Any] = {}
    for artifact in (folder / "artifacts" / name for name in STAGES):
        if artifact.exists():
            record = trials.read(artifact / "stage.json")
            found[artifact.name] = {
                "curve": trials.validation_curve(artifact),
                "seconds": record["seconds"]["total"],
                "metrics": record["metrics"],
            }
    core, prepared = folder / "artifacts" / "core", folder / "artifacts" / "core.prepare"
    return found | {"right": held_out_text.measure(core, prepared)["right"]}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Losses of all arms and seeds, and how AFM's claim stands.

    Args:
        runs: arm -> what `read` says of each seed.
    """
    arms = {}
    for arm, seeds in runs.items():
        curves = [run["core"]["curve"] for run in seeds]
        arms[arm] = {
            **trials.mean_curve(curves),
            "before": spread([curve[0][1] for curve in curves]),
            "after": spread([curve[-1][1] for curve in curves]),
            "right": spread([run["right"] for run in seeds]),
            "seconds": spread([sum(run[name]["seconds"] for name in STAGES[1:] if name in run) for run in seeds]),
        }
    scratch = arms[BASELINE]["after"]["values"]
    judged = []
    for arm in arms:
        if arm != BASELINE:
            gains = differences(scratch, arms[arm]["after"]["values"])
            says = f"{arm}: at equal tokens below the held-out loss of {BASELINE}, on each seed (nats, the least)"
            judged.append(claims.claim(says, min(gains), spread(gains), above=0.0))
            found = differences(arms[arm]["right"]["values"], arms[BASELINE]["right"]["values"])
            says = f"{arm}: at equal tokens more of the held-out tokens are found than by {BASELINE}, on each seed"
            judged.append(claims.claim(says, min(found), spread(found), above=0.0))
    hard = [run["masks"]["metrics"]["masks/hardness"] for run in runs["learnt masks"]]
    return {
        "claims": judged,
        "arms": arms,
        "parent": spread([run["parent"]["curve"][-1][1] for run in runs["learnt masks"]]),
        "masked": spread([run["masks"]["curve"][-1][1] for run in runs["learnt masks"]]),
        "masks/hardness": spread(hard),
    }


# ---- what docs/methods/pruning.md shows ----


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of arms: held-out nats before and after and the share of tokens that are found likeliest, mean
    and standard deviation over the seeds."""
    gains = {claim["claim"].partition(":")[0]: claim for claim in result["claims"] if "loss" in claim["claim"]}
    rows = [
        [
            arm,
            figures.shown(found["before"]),
            figures.shown(found["after"]),
            figures.by_seed(gains[arm]) if arm in gains else "",
            figures.shown(found["right"]),
        ]
        for arm, found in result["arms"].items()
    ]
    head = ["small model", "nats before", "nats after", f"below `{BASELINE}`, by seed", "tokens found"]
    return figures.lines_of_table(head, rows)


def draw(result: Mapping[str, Any]) -> None:
    """Held-out loss of the small model over its tokens, the mean of the seeds, an arm a line."""
    before = ("the parent", result["parent"]["mean"])
    figures.draw_curves(PICTURE, result["arms"], before, "tokens of the small model")


if __name__ == "__main__":
    trials.publish(__doc__, RESULT, measure, table, draw)
