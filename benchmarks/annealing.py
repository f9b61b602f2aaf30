"""Is the average of an annealing better than its last weights, and does annealing tell a good data set from a bad one?
Writes results/annealing.json and docs/images/annealing.svg.

    python benchmarks/annealing.py [--seeds 0 1 2] [overrides ...]

All anneals of a seed start from one model, which the store holds after the first: long_context of recipe qwen2, and the
half-trained one of recipe judge_data.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import claims
import machine
from learning import spread
from reward_models import read, run

from lightning_llm.data.embedded.text import READERS

RESULT = Path(__file__).resolve().parent / "results" / "annealing.json"
PICTURE = machine.REPOSITORY / "docs" / "images" / "annealing.svg"
ANNEAL = ["+stage@stages.anneal=anneal", "stages.anneal.starts_from=long_context"]
AVERAGES = {  # what is averaged on the way -> settings of the stage
    "rate to 0, second half (as conf/stage/anneal.yaml)": [],
    "rate to 0, all of it": ["stages.anneal.averaging.from_share=0"],
    "rate to 0, EMA of 0.99": ["stages.anneal.averaging.method=ema", "stages.anneal.averaging.from_share=0"],
    "constant rate, second half": ["stages.anneal.lr.schedule=constant", "stages.anneal.lr.final=null"],
}
MAIN = next(iter(AVERAGES))
CONSTANT = list(AVERAGES)[-1]
DEFAULT, INSTRUCTIONS, SCRAMBLED = "default mix", "instructions", "scrambled web"
PERPLEXITY, TASKS = "perplexity/", "tasks/exact_match"
Figures = dict[str, list[dict[str, float]]]  # what was done -> metrics of each seed


def anneal(seed: int, words: Sequence[str], overrides: Sequence[str]) -> dict[str, float]:
    """Metrics of one annealing, of the average and of the last weights."""
    folder = run("recipe=qwen2", f"seed={seed}", "until=anneal", *ANNEAL, *words, *overrides)
    return read(folder / "artifacts" / "anneal.evaluate" / "metrics.json")


def judge(seed: int, candidates: dict[str, list[str]], overrides: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics of every candidate's annealing, of the default's, and of the model before."""
    found: dict[str, dict[str, float]] = {}
    for name, words in candidates.items():
        artifacts = run("recipe=judge_data", f"seed={seed}", *words, *overrides) / "artifacts"
        found[name] = read(artifacts / "candidate.evaluate" / "metrics.json")
        found[DEFAULT] = read(artifacts / "default.evaluate" / "metrics.json")
        found["half-trained"] = read(artifacts / "half.evaluate" / "metrics.json")
    return found


def scrambled(path: Path) -> Path:
    """The embedded web text with the words of each document in any order: nothing to be learnt but which words there
    are."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _, text in READERS["web"]():
            words = text.split()
            chance.shuffle(words)
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def log_perplexity(metrics: dict[str, float], prefix: str = "") -> float:
    """Mean over the domains, in nats.

    Args:
        prefix: last/ for the last weights of an average.
    """
    values = [value for name, value in metrics.items() if name.startswith(prefix + PERPLEXITY)]
    return statistics.fmean(map(math.log, values))


def averaged(found: Figures) -> dict[str, Any]:
    """Of every way to average: nats of the last weights and of the average, and what it gains over them."""
    summary = {}
    for name, runs in found.items():
        last, mean = ([log_perplexity(metrics, prefix) for metrics in runs] for prefix in ("last/", ""))
        gain = [a - b for a, b in zip(last, mean, strict=True)]
        summary[name] = {"last": spread(last), "average": spread(mean), "gain": spread(gain)}
    return summary


def judged(found: Figures) -> dict[str, Any]:
    """Of every candidate: nats by domain and in the mean, exact match, and both against the default's of its seed."""
    summary = {}
    for name, runs in found.items():
        nats, right = [log_perplexity(metrics) for metrics in runs], [metrics[TASKS] for metrics in runs]
        before = found[DEFAULT]
        domains = sorted(metric for metric in runs[0] if metric.startswith(PERPLEXITY))
        summary[name] = {
            "nats": spread(nats),
            "change": spread([own - log_perplexity(other) for own, other in zip(nats, before, strict=True)]),
            "right": spread(right),
            "right_change": spread([own - other[TASKS] for own, other in zip(right, before, strict=True)]),
            "domains": {
                domain.removeprefix(PERPLEXITY): spread(
                    [math.log(own[domain] / other[domain]) for own, other in zip(runs, before, strict=True)]
                )
                for domain in domains
            },
        }
    return summary


def verdicts(averages: dict[str, Any], data: dict[str, Any]) -> list[dict[str, Any]]:
    """What the papers say, on the worst of the seeds."""

    def worst(values: list[float], says: str, **bounds: float) -> dict[str, Any]:
        return claims.claim(f"{says}, worst seed", min(values), {"values": values}, **bounds)

    gains = {name: averages[name]["gain"]["values"] for name in (MAIN, CONSTANT)}
    better = "The average of an annealing predicts held-out text better than its last weights (nats)"
    right = "Annealing on demonstrations raises exact match (change against the default mix)"
    return [
        worst(gains[MAIN], f"{better}, rate to 0", above=0.0),
        worst(gains[CONSTANT], f"{better}, constant rate", above=0.0),
        worst(data[INSTRUCTIONS]["right_change"]["values"], right, above=0.0),
        worst(data[SCRAMBLED]["change"]["values"], "Scrambled text raises the loss (nats)", above=0.0),
    ]


# ---- what docs/methods/annealing.md shows ----


def average_table(averages: dict[str, Any]) -> list[str]:
    """Lines of the table of averages: nats per token, mean over domains, and the gain of each seed."""
    rows = [
        [name, f"{found['last']['mean']:.4f}", f"{found['average']['mean']:.4f}", _signed(found["gain"])]
        for name, found in averages.items()
    ]
    return _table(["annealing", "last weights", "average", "gain, by seed"], rows)


def data_table(data: dict[str, Any]) -> list[str]:
    """Lines of the table of data sets: against the default's annealing, nats and exact match."""
    rows = [
        [name, f"{found['nats']['mean']:.4f}", _signed(found["change"]), f"{found['right']['mean']:.3f}",
         _signed(found["right_change"], 3)]
        for name, found in data.items()
    ]  # fmt: skip
    return _table(["30 % of", "nats", "against the default, by seed", "exact match", "against the default"], rows)


def _signed(figure: dict[str, Any], digits: int = 4) -> str:
    return ", ".join(f"{value:+.{digits}f}" for value in figure["values"])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def draw(averages: dict[str, Any], data: dict[str, Any]) -> None:
    """The gain of each average with a dot a seed, and what each data set changes in every domain."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "annealing"  # the same picture from the same figures
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 3.6))
    for place, found in enumerate(averages.values()):
        left.barh(place, found["gain"]["mean"], height=0.6, alpha=0.6)
        left.plot(found["gain"]["values"], [place] * len(found["gain"]["values"]), "o", color="black", markersize=3)
    left.set_yticks(range(len(averages)), [name.partition(" (")[0] for name in averages])
    left.invert_yaxis()
    left.set(xlabel="nats per token that the average gains over the last weights")
    shown = {name: found for name, found in data.items() if name not in (DEFAULT, "half-trained")}
    domains = list(next(iter(shown.values()))["domains"])
    width = 0.8 / len(shown)
    for place, (name, found) in enumerate(shown.items()):
        for index, domain in enumerate(domains):
            values = found["domains"][domain]["values"]
            x = index + (place - (len(shown) - 1) / 2) * width
            bar = right.bar(x, statistics.fmean(values), width, color=f"C{place}", alpha=0.6)
            right.plot([x] * len(values), values, "o", color="black", markersize=3)
            bar.set_label(name if not index else "")
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(range(len(domains)), domains)
    right.set(ylabel="nats per token above the default mix")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="as on lightning-llm's command line")
    arguments = parser.parse_args()

    seeds, overrides = arguments.seeds, arguments.overrides
    means = {name: [anneal(seed, words, overrides) for seed in seeds] for name, words in AVERAGES.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = scrambled(Path(folder) / "scrambled.jsonl")
        source = f"stages.candidate.data.sources.candidate.path={path}"
        candidates = {INSTRUCTIONS: [], SCRAMBLED: [source]}
        of_seeds = [judge(seed, candidates, overrides) for seed in seeds]
    order = ["half-trained", DEFAULT, *candidates]
    data = {name: [found[name] for found in of_seeds] for name in order}
    result: dict[str, Any] = {"seeds": seeds, "machine": machine.describe()}
    result |= {"averages": averaged(means), "data": judged(data)}
    result["claims"] = verdicts(result["averages"], result["data"])
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join([*average_table(result["averages"]), "", *data_table(result["data"])]))
    if arguments.result == RESULT:
        draw(result["averages"], result["data"])
    for entry in result["claims"]:
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {entry['value']:.4g}")
    claims.finish([entry["holds"] for entry in result["claims"]])


if __name__ == "__main__":
    main()
