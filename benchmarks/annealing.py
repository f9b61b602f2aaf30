"""Is the average of an annealing better than its last weights, and does annealing tell a good data set from a bad one?
Writes results/annealing.json and docs/images/annealing.svg.

    python benchmarks/annealing.py [--parts averages data] [--seeds 0 1 2] [--jobs 4] [overrides ...]

A part's figures replace those that are there. All anneals of a seed start from one model, which the store holds after
the first: long_context of recipe qwen2, and the half-trained one of recipe judge_data.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import claims
import figures
import trials
from trials import differences, read, run, spread

from lightning_llm.data.embedded.text import READERS

RESULT = claims.RESULTS / "annealing.json"
PICTURE = figures.IMAGES / "annealing.svg"
ANNEAL = ["+stage@stages.anneal=anneal", "stages.anneal.starts_from=long_context"]
WAYS = {  # what is averaged on the way -> settings of the stage
    "rate to 0, second half (as conf/stage/anneal.yaml)": [],
    "rate to 0, all of it": ["stages.anneal.averaging.from_share=0"],
    "rate to 0, EMA of 0.99": ["stages.anneal.averaging.method=ema", "stages.anneal.averaging.from_share=0"],
}
AVERAGES, DATA = PARTS = ("averages", "data")
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
        summary[name] = {"last": spread(last), "average": spread(mean), "gain": spread(differences(last, mean))}
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
    if part == AVERAGES:
        says = "The average of an annealing predicts held-out text better than its last weights (nats)"
        return [claims.worst(f"{says}: {name}", each["gain"]["values"], above=0.0) for name, each in found.items()]
    right = "Annealing on demonstrations raises exact match (change against the default mix)"
    return [
        claims.worst(right, found[INSTRUCTIONS]["right_change"]["values"], above=0.0),
        claims.worst("Scrambled text raises the loss (nats)", found[SCRAMBLED]["change"]["values"], above=0.0),
    ]


def measure(part: str, arguments: Namespace) -> trials.Result:
    """A part of the result."""
    found = measured(part, arguments)
    return {"claims": verdicts(part, found), "found": found}


def measured(part: str, arguments: Namespace) -> dict[str, Any]:
    """All figures of a part."""
    if part == AVERAGES:
        return averaged(trials.of_arms(lambda seed, name, words: anneal(seed, WAYS[name], words), WAYS, arguments))
    with tempfile.TemporaryDirectory() as folder:
        source = f"stages.candidate.data.sources.candidate.path={scrambled(Path(folder) / 'scrambled.jsonl')}"
        candidates = {INSTRUCTIONS: [], SCRAMBLED: [source]}
        calls = [(seed, candidates, arguments.overrides) for seed in arguments.seeds]
        of_seeds = trials.side_by_side(judge, calls, arguments.jobs)
    order = ["half-trained", DEFAULT, *candidates]
    return judged({name: [found[name] for found in of_seeds] for name in order})


# ---- what docs/methods/annealing.md shows ----


def average_table(result: dict[str, Any]) -> list[str]:
    """Lines of the table of averages: nats per token, mean over domains, and the gain of each seed."""
    rows = [
        [
            name,
            f"{found['last']['mean']:.4f}",
            f"{found['average']['mean']:.4f}",
            figures.by_seed(found["gain"], "+.4f", ", "),
        ]
        for name, found in result[AVERAGES]["found"].items()
    ]
    return figures.lines_of_table(["annealing", "last weights", "average", "gain, by seed"], rows)


def data_table(result: dict[str, Any]) -> list[str]:
    """Lines of the table of data sets: against the default's annealing, nats and exact match; none without them."""
    if DATA not in result:
        return []
    rows = [
        [name, f"{found['nats']['mean']:.4f}", figures.by_seed(found["change"], "+.4f", ", "),
         f"{found['right']['mean']:.3f}", figures.by_seed(found["right_change"], "+.3f", ", ")]
        for name, found in result[DATA]["found"].items()
    ]  # fmt: skip
    head = ["30 % of", "nats", "against the default, by seed", "exact match", "against the default"]
    return figures.lines_of_table(head, rows)


def table(part: str, found: dict[str, Any]) -> list[str]:
    """Lines of a part's table."""
    return (average_table if part == AVERAGES else data_table)({part: found})


def draw(part: str, result: dict[str, Any]) -> None:
    """The gain of each average with a dot a seed, and what each data set changes in every domain: one picture of all
    parts."""
    count = 1 + (DATA in result)
    with figures.drawing(PICTURE, columns=count, size=(1.5 + 5 * count, 3.4)) as panels:
        averages = result[AVERAGES]["found"] if AVERAGES in result else {}
        gains = {name.partition(" (")[0]: found["gain"] for name, found in averages.items()}
        figures.draw_bars(panels[0], gains)
        panels[0].set(xlabel="nats per token that the average gains over the last weights")
        if DATA in result:
            _draw_domains(panels[1], result[DATA]["found"])


def _draw_domains(axes: Any, data: dict[str, Any]) -> None:
    shown = {name: found for name, found in data.items() if name not in (DEFAULT, "half-trained")}
    domains = list(next(iter(shown.values()))["domains"])
    width = 0.8 / len(shown)
    for place, (name, found) in enumerate(shown.items()):
        for index, domain in enumerate(domains):
            values = found["domains"][domain]["values"]
            x = index + (place - (len(shown) - 1) / 2) * width
            bar = axes.bar(x, statistics.fmean(values), width, color=f"C{place}", alpha=0.6)
            figures.dots(axes, x, values)
            bar.set_label(name if not index else "")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(domains)), domains)
    axes.set(ylabel="nats per token above the default mix")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    typed = trials.parser(__doc__, RESULT, parts=PARTS).parse_args()
    trials.publish_parts(typed, RESULT, measure, table, draw)
