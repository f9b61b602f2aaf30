"""How often is a reward model right on held-out comparisons, and as sure as it may be? After SFT, per loss and seed.
Writes results/reward_models.json and docs/images/reward_models.svg.

    python benchmarks/reward_models.py [--seeds 0 1 2] [--jobs 4] [overrides ...]

All losses start from the SFT model of their seed, which is trained once.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import claims
import figures
import trials
from trials import read, run, spread, spreads

RESULT = claims.RESULTS / "reward_models.json"
PICTURE = figures.IMAGES / "reward_models.svg"
OBJECTIVE = "stages.reward_model.objective"
LOSSES = {
    "Bradley-Terry (Llama 3)": [],
    "with large margins (Llama 2)": [f"{OBJECTIVE}.margins=large"],
    "soft labels (AFM)": [f"{OBJECTIVE}.loss=soft_labels"],
}
MAIN = next(iter(LOSSES))  # what the claim is about
ACCURACY = "preference/accuracy"
COLUMNS = {
    ACCURACY: "right",
    f"{ACCURACY}_slightly": "slightly",
    f"{ACCURACY}_clearly": "clearly",
    f"{ACCURACY}_significantly": "significantly",
    "preference/edited_first": "edited first",
    "preference/calibration_error": "calibration error",
    "preference/length_correlation": "with length",
}  # metric -> head of a column


def train(seed: int, loss: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One reward model: its metrics and calibration, seconds of its training, and what the SFT model could do."""
    artifacts = run("recipe=qwen2", f"seed={seed}", "until=reward_model", *LOSSES[loss], *overrides) / "artifacts"
    evaluated, record = artifacts / "reward_model.evaluate", read(artifacts / "reward_model" / "stage.json")
    return {
        "sft": read(artifacts / "sft.evaluate" / "metrics.json")["tasks/exact_match"],
        "metrics": read(evaluated / "metrics.json"),
        "calibration": read(evaluated / "calibration.json"),
        "seconds": record["seconds"]["total"],
        "tokens": record["metrics"]["tokens"],
    }


def measure(arguments: Namespace) -> trials.Result:
    """The result."""
    found = trials.of_arms(train, LOSSES, arguments)
    losses = summarise(found)
    return {"claims": judge(losses), "sft": spread([run["sft"] for run in found[MAIN]]), "losses": losses}


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Every loss with the spread of its figures over the seeds, and its calibration over all of them together."""
    return {
        loss: {
            "metrics": spreads([run["metrics"] for run in runs]),
            "seconds": spread([run["seconds"] for run in runs]),
            "tokens": runs[0]["tokens"],
            "calibration": [pooled(entries) for entries in zip(*(run["calibration"] for run in runs), strict=True)],
        }
        for loss, runs in found.items()
    }


def pooled(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One strength's calibration over several models: means of its figures, and its bins together."""
    bins: dict[float, list[dict[str, float]]] = {}
    for entry in entries:
        for each in entry["bins"]:
            bins.setdefault(each["begin"], []).append(each)
    together = []
    for begin, own in sorted(bins.items()):
        pairs = sum(each["pairs"] for each in own)
        means = {name: sum(each[name] * each["pairs"] for each in own) / pairs for name in ("predicted", "frequency")}
        together.append({"begin": begin, "end": own[0]["end"], "pairs": pairs, **means})
    figures = ("accuracy", "predicted", "calibration_error")
    return {
        "strength": entries[0]["strength"],
        "pairs": sum(entry["pairs"] for entry in entries),
        **{name: statistics.fmean(entry[name] for entry in entries) for name in figures},
        "bins": together,
    }


def judge(losses: dict[str, Any]) -> list[dict[str, Any]]:
    """What is owed: more than four of five held-out comparisons, in the mean and on the worst of the seeds."""
    found = losses[MAIN]["metrics"][ACCURACY]
    says = "Reward model: accuracy on held-out comparisons"
    return [claims.mean(says, found["values"], above=0.8), claims.worst(says, found["values"], above=0.8)]


# ---- what docs/methods/reward_models.md shows ----


def metric_table(losses: dict[str, Any]) -> list[str]:
    """Lines of the table of losses: mean and standard deviation over the seeds."""
    head = ["loss", *COLUMNS.values()]
    rows = [[loss, *(figures.shown(found["metrics"].get(name)) for name in COLUMNS)] for loss, found in losses.items()]
    return figures.lines_of_table(head, rows)


def calibration_table(losses: dict[str, Any]) -> list[str]:
    """Lines of the table of predicted probabilities against frequencies, by strength."""
    strengths = [entry["strength"] for entry in losses[MAIN]["calibration"]]
    head = ["loss", *(f"{strength}: predicted, right" for strength in strengths)]
    rows = [
        [loss, *(f"{entry['predicted']:.2f}, {entry['accuracy']:.2f}" for entry in found["calibration"])]
        for loss, found in losses.items()
    ]
    return figures.lines_of_table(head, rows)


def tables(result: trials.Result) -> list[str]:
    """Lines of both."""
    return [*metric_table(result["losses"]), "", *calibration_table(result["losses"])]


def draw(result: trials.Result) -> None:
    """Frequency over predicted probability, and accuracy by strength with a dot for each seed."""
    losses = result["losses"]
    with figures.drawing(PICTURE, columns=2, size=(9.5, 3.8)) as [curves, bars]:
        curves.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8, linestyle=":")
        strengths = [entry["strength"] for entry in losses[MAIN]["calibration"][1:]]
        width = 0.8 / len(losses)
        for place, (loss, found) in enumerate(losses.items()):
            bins = [each for each in found["calibration"][0]["bins"] if each["pairs"] >= 20]
            points = [[each[name] for each in bins] for name in ("predicted", "frequency")]
            [line] = curves.plot(*points, marker="o", markersize=4, label=loss)
            for index, strength in enumerate(strengths):
                values = found["metrics"][f"{ACCURACY}_{strength}"]["values"]
                x = index + (place - (len(losses) - 1) / 2) * width
                bars.bar(x, statistics.fmean(values), width, color=line.get_color(), alpha=0.6)
                figures.dots(bars, x, values, line.get_color())
        curves.set(xlabel="predicted probability of the preferred order", ylabel="frequency", ylim=(0.4, 1.02))
        curves.legend(fontsize=8)
        bars.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        bars.set_xticks(range(len(strengths)), [f"{strength}\nbetter" for strength in strengths])
        bars.set(ylabel="held-out comparisons that are right", ylim=(0, 1.02))


if __name__ == "__main__":
    trials.publish(__doc__, RESULT, measure, tables, draw)
