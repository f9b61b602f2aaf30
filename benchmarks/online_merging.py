"""Does merging every step with what SFT has learnt keep what preference training costs? Offline DPO plain and with
Qwen 2's online merging optimizers, per seed. Writes results/online_merging.json and docs/images/online_merging.svg.

    python benchmarks/online_merging.py [--seeds 0 1 2] [--jobs 4] [overrides ...]

A tenth of a step's entries is kept without rescaling, and the learning rate is raised by as much as that takes away.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import claims
import figures
import trials

RESULT = claims.RESULTS / "online_merging.json"
PICTURE = figures.IMAGES / "online_merging.svg"
PLAIN = "AdamW"
EXACT, KL, CODE = "tasks/exact_match", "kl/reference", "perplexity/code"
COLUMNS = {
    EXACT: "exact match",
    "preference/accuracy": "preference accuracy",
    KL: "KL to the SFT model, nats",
    CODE: "perplexity of code",
}


def merging(method: str, alpha: float, peak: float) -> list[str]:
    """DPO's optimizer with merging around it, at a learning rate of its own."""
    given = f"{{method: {method}, base: long_context, reserve_rate: 0.1, alpha: {alpha:g}}}"
    return [f"stages.dpo.optimizer.online_merging={given}", f"stages.dpo.lr.peak={peak:g}"]


ARMS = {  # arm -> what is typed; plain DPO's rate at nano is 1.5e-4
    PLAIN: [],
    "OnDARE, alpha 0.001": merging("ondare", 1e-3, 1.5e-3),
    "OnDARE, alpha 0.01": merging("ondare", 1e-2, 1.5e-3),
    "OnTIES, alpha 0.001": merging("onties", 1e-3, 7.5e-4),
}


def measure(arguments: Namespace) -> trials.Result:
    """The result."""
    return summarise(trials.of_arms(train, ARMS, arguments))


def train(seed: int, arm: str, overrides: Sequence[str]) -> dict[str, float]:
    """Metrics of the model after DPO."""
    folder = trials.run("recipe=qwen2", f"seed={seed}", "until=dpo", *ARMS[arm], *overrides)
    return trials.read(folder / "artifacts" / "dpo.evaluate" / "metrics.json")


def summarise(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Every arm's figures and what they differ from plain DPO's of the same seed; what the paper claims."""
    arms: dict[str, Any] = {}
    for arm, runs in found.items():
        own = trials.spreads([{name: metrics[name] for name in COLUMNS} for metrics in runs])
        arms[arm] = {"figures": own, "change": trials.changes(arms[PLAIN]["figures"] if arms else own, own)}
    says = "{}: less is forgotten than by plain DPO (perplexity of code)"
    judged = [
        claims.mean(says.format(arm), each["change"][CODE]["values"], below=0.0)
        for arm, each in arms.items()
        if arm != PLAIN
    ]
    return {"claims": judged, "arms": arms}


# ---- what docs/methods/online_merging.md shows ----


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of arms: mean and standard deviation over the seeds."""
    rows = [[arm, *(figures.shown(each["figures"][name]) for name in COLUMNS)] for arm, each in result["arms"].items()]
    return figures.lines_of_table(["optimizer", *COLUMNS.values()], rows)


def draw(result: Mapping[str, Any]) -> None:
    """What each kind of merging changes against plain DPO of the same seed."""
    shown = (EXACT, KL, CODE)
    with figures.drawing(PICTURE, columns=len(shown), size=(11, 2.6)) as panels:
        for axes, name in zip(panels, shown, strict=True):
            changes = {arm: each["change"][name] for arm, each in result["arms"].items() if arm != PLAIN}
            figures.draw_bars(axes, changes)
            axes.set(xlabel=f"change of {COLUMNS[name]}")
            if axes is not panels[0]:
                axes.set_yticklabels([])


if __name__ == "__main__":
    trials.publish(__doc__, RESULT, measure, table, draw)
