"""Is the average of an annealing better than its last weights, and does annealing tell a good data set from a bad one?
Writes results/annealing.json and docs/images/annealing.svg.

    python benchmarks/annealing.py [--parts averages constant_rate data] [--seeds 0 1 2] [overrides ...]

A part's figures replace those that are there. All anneals of a seed start from one model, which the store holds after
the first: long_context of recipe qwen2, and the half-trained one of recipe judge_data.
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
AVERAGES = {  # part -> what is averaged on the way -> settings of the stage
    "averages": {
        "rate to 0, second half (as conf/stage/anneal.yaml)": [],
        "rate to 0, all of it": ["stages.anneal.averaging.from_share=0"],
        "rate to 0, EMA of 0.99": ["stages.anneal.averaging.method=ema", "stages.anneal.averaging.from_share=0"],
    },
    "constant_rate": {
        "constant rate, second half": ["stages.anneal.lr.schedule=constant", "stages.anneal.lr.final=null"],
    },
}
PARTS = (*AVERAGES, "data")
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


def verdicts(part: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the papers say, on the worst of the seeds."""

    def worst(values: list[float], says: str, **bounds: float) -> dict[str, Any]:
        return claims.claim(f"{says}, worst seed", min(values), {"values": values}, **bounds)

    if part in AVERAGES:
        says = "The average of an annealing predicts held-out text better than its last weights (nats)"
        return [worst(each["gain"]["values"], f"{says}: {name}", above=0.0) for name, each in found.items()]
    right = "Annealing on demonstrations raises exact match (change against the default mix)"
    return [
        worst(found[INSTRUCTIONS]["right_change"]["values"], right, above=0.0),
        worst(found[SCRAMBLED]["change"]["values"], "Scrambled text raises the loss (nats)", above=0.0),
    ]


def measure(part: str, seeds: Sequence[int], overrides: Sequence[str], jobs: int = 1) -> dict[str, Any]:
    """All figures of a part."""
    if part in AVERAGES:
        ways = AVERAGES[part]
        calls = [(seed, words, overrides) for words in ways.values() for seed in seeds]
        annealed = iter(machine.side_by_side(anneal, calls, jobs))
        return averaged({name: [next(annealed) for _ in seeds] for name in ways})
    with tempfile.TemporaryDirectory() as folder:
        source = f"stages.candidate.data.sources.candidate.path={scrambled(Path(folder) / 'scrambled.jsonl')}"
        candidates = {INSTRUCTIONS: [], SCRAMBLED: [source]}
        of_seeds = machine.side_by_side(judge, [(seed, candidates, overrides) for seed in seeds], jobs)
    order = ["half-trained", DEFAULT, *candidates]
    return judged({name: [found[name] for found in of_seeds] for name in order})


# ---- what docs/methods/annealing.md shows ----


def all_averages(result: dict[str, Any]) -> dict[str, Any]:
    """Of all parts that are there."""
    return {name: found for part in AVERAGES if part in result for name, found in result[part]["found"].items()}


def average_table(result: dict[str, Any]) -> list[str]:
    """Lines of the table of averages: nats per token, mean over domains, and the gain of each seed."""
    rows = [
        [name, f"{found['last']['mean']:.4f}", f"{found['average']['mean']:.4f}", _signed(found["gain"])]
        for name, found in all_averages(result).items()
    ]
    return _table(["annealing", "last weights", "average", "gain, by seed"], rows)


def data_table(result: dict[str, Any]) -> list[str]:
    """Lines of the table of data sets: against the default's annealing, nats and exact match; none without them."""
    if "data" not in result:
        return []
    rows = [
        [name, f"{found['nats']['mean']:.4f}", _signed(found["change"]), f"{found['right']['mean']:.3f}",
         _signed(found["right_change"], 3)]
        for name, found in result["data"]["found"].items()
    ]  # fmt: skip
    return _table(["30 % of", "nats", "against the default, by seed", "exact match", "against the default"], rows)


def _signed(figure: dict[str, Any], digits: int = 4) -> str:
    return ", ".join(f"{value:+.{digits}f}" for value in figure["values"])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def draw(result: dict[str, Any]) -> None:
    """The gain of each average with a dot a seed, and what each data set changes in every domain."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "annealing"  # the same picture from the same figures
    from matplotlib import pyplot

    count = 1 + ("data" in result)
    figure, panels = pyplot.subplots(1, count, figsize=(1.5 + 5 * count, 3.4), squeeze=False)
    _draw_gains(panels[0][0], all_averages(result))
    if "data" in result:
        _draw_domains(panels[0][1], result["data"]["found"])
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None}, bbox_inches="tight")


def _draw_gains(axes: Any, averages: dict[str, Any]) -> None:
    for place, found in enumerate(averages.values()):
        axes.barh(place, found["gain"]["mean"], height=0.6, alpha=0.6)
        axes.plot(found["gain"]["values"], [place] * len(found["gain"]["values"]), "o", color="black", markersize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(averages)), [name.partition(" (")[0] for name in averages])
    axes.invert_yaxis()
    axes.set(xlabel="nats per token that the average gains over the last weights")


def _draw_domains(axes: Any, data: dict[str, Any]) -> None:
    shown = {name: found for name, found in data.items() if name not in (DEFAULT, "half-trained")}
    domains = list(next(iter(shown.values()))["domains"])
    width = 0.8 / len(shown)
    for place, (name, found) in enumerate(shown.items()):
        for index, domain in enumerate(domains):
            values = found["domains"][domain]["values"]
            x = index + (place - (len(shown) - 1) / 2) * width
            bar = axes.bar(x, statistics.fmean(values), width, color=f"C{place}", alpha=0.6)
            axes.plot([x] * len(values), values, "o", color="black", markersize=3)
            bar.set_label(name if not index else "")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(domains)), domains)
    axes.set(ylabel="nats per token above the default mix")
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--result", type=Path, default=RESULT)
    machine.add_jobs(parser)
    parser.add_argument("overrides", nargs="*", help="as on lightning-llm's command line")
    arguments = parser.parse_args()

    result: dict[str, Any] = json.loads(arguments.result.read_text()) if arguments.result.is_file() else {}
    verdict = []
    for part in arguments.parts:
        found = measure(part, arguments.seeds, arguments.overrides, arguments.jobs)
        about = {"seeds": arguments.seeds, "machine": machine.describe(), "claims": verdicts(part, found)}
        result[part] = about | {"found": found}
        arguments.result.parent.mkdir(parents=True, exist_ok=True)
        arguments.result.write_text(json.dumps(result, indent=2) + "\n")
        verdict += about["claims"]
    print("\n".join([*average_table(result), "", *data_table(result)]))
    if arguments.result == RESULT:
        draw(result)
    for entry in verdict:
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {entry['value']:.4g}")
    claims.finish([entry["holds"] for entry in verdict])


if __name__ == "__main__":
    main()
