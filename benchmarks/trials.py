"""Runs of recipes that a benchmark learns from, seed by seed: started, read and gathered; and the script around them,
which measures, writes down, shows and says what holds."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import claims
import machine

SEEDS = (0, 1, 2)
PLACES = ("store.", "runs=")  # overrides that say where things lie, not what is done
Found = TypeVar("Found")
Result = dict[str, Any]


def run(*words: str) -> Path:
    """The folder of a run; what the store holds is not made again. A run that fails is the end of this."""
    with subprocess.Popen(machine.command("run", *words), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [line.strip() for line in process.stdout]
    if process.returncode:
        sys.exit(f"{' '.join(words)}: exit code {process.returncode}")
    return Path(lines[-1])


def side_by_side(work: Callable[..., Found], calls: Iterable[tuple[Any, ...]], jobs: int) -> list[Found]:
    """What `work` finds for each call, in their order, `jobs` at a time: it is other processes that work, and they wait
    for one another where they need the same artifact."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda call: work(*call), calls))


def of_arms(
    work: Callable[[int, str, Sequence[str]], Found], arms: Iterable[str], arguments: argparse.Namespace
) -> dict[str, list[Found]]:
    """arm -> what `work` finds of each seed.

    Args:
        work: seed, arm, overrides -> figures.
    """
    names = list(arms)
    calls = [(seed, arm, arguments.overrides) for arm in names for seed in arguments.seeds]
    found = iter(side_by_side(work, calls, arguments.jobs))
    return {arm: [next(found) for _ in arguments.seeds] for arm in names}


def read(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text("utf-8"))


def journal(artifact: Path) -> list[dict[str, Any]]:
    """What a stage has written down on its way, line by line; nothing of one that does not train."""
    path = artifact / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def validation_curve(artifact: Path) -> list[tuple[float, float]]:
    """Held-out loss on the way of a stage: (tokens, nats per token)."""
    return [(line["tokens"], line["validation/loss"]) for line in journal(artifact) if "validation/loss" in line]


# ---- several seeds ----


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Values, mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"values": list(values), "mean": statistics.fmean(values), "standard_deviation": deviation}


def spreads(per_seed: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The spread of each figure that every seed has."""
    names = [name for name in per_seed[0] if all(name in figures for figures in per_seed)]
    return {name: spread([figures[name] for figures in per_seed]) for name in names}


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """By how much each of `one` lies above the same seed's of `other`."""
    return [a - b for a, b in zip(one, other, strict=True)]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The spread of what each figure has changed within its seed, from spreads of the two."""
    return {
        name: spread(differences(found["values"], before[name]["values"]))
        for name, found in after.items()
        if name in before
    }


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> dict[str, list[float]]:
    """`tokens` of the first curve, `curve`: the mean of all at each of them, where they have their points alike."""
    means = [statistics.fmean(value for _, value in points) for points in zip(*curves, strict=True)]
    return {"tokens": [tokens for tokens, _ in curves[0]], "curve": means}


# ---- a script: what is typed, what is written, what is said ----


def parser(
    about: str | None, result: Path, *, parts: Sequence[str] = (), seeds: Sequence[int] = SEEDS
) -> argparse.ArgumentParser:
    """What every benchmark of learning may be told.

    Args:
        about: the script's docstring.
        result: where its figures are kept.
        parts: of the result, if each may be measured by itself.
        seeds: if none are given.
    """
    words = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if parts:
        words.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    words.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    words.add_argument("--result", type=Path, default=result)
    words.add_argument("--jobs", type=int, default=1, help="runs at a time; give each compute.threads=1")
    words.add_argument("overrides", nargs="*", help="as on lightning-llm's command line")
    return words


def without_places(overrides: Sequence[str]) -> list[str]:
    """What is overridden, but for where things lie."""
    return [word for word in overrides if not word.startswith(PLACES)]


def conditions(arguments: argparse.Namespace) -> Result:
    """What stands in front of all figures: how they were made."""
    return {
        "seeds": arguments.seeds,
        "overrides": without_places(arguments.overrides),
        "machine": machine.describe(),
    }


def publish(
    about: str | None,
    result: Path,
    measure: Callable[[argparse.Namespace], Result],
    table: Callable[[Result], list[str]] | None = None,
    draw: Callable[[Result], None] | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
) -> None:
    """The script of one result: measured, written, its table printed, drawn if it is where pages look for it, judged.

    Args:
        measure: what is typed (seeds, overrides, jobs) -> `claims` and figures.
        table, draw: none, if the page that shows them is made by another script.
    """
    arguments = parser(about, result, seeds=seeds).parse_args()
    found = {**conditions(arguments), **measure(arguments)}
    claims.write(arguments.result, found)
    if table:
        print("\n".join(table(found)))
    if draw and arguments.result == result:
        draw(found)
    claims.finish([claims.say(found["claims"])])


def publish_parts(
    arguments: argparse.Namespace,
    result: Path,
    measure: Callable[[str, argparse.Namespace], Result],
    table: Callable[[str, Result], list[str]],
    draw: Callable[[str, Result], None],
) -> None:
    """The script of a result in parts: those that are asked for take the places of those that were there.

    Args:
        arguments: of `parser`, with parts.
        measure: part, what is typed -> its `claims` and figures.
        table: part, its figures -> lines.
        draw: part, the whole result -> pictures that show it.
    """
    verdicts = []
    for part in arguments.parts:
        found = {**conditions(arguments), **measure(part, arguments)}
        print("\n".join(table(part, found)))
        verdicts.append(claims.write_part(arguments.result, part, found))
        if arguments.result == result:
            draw(part, read(result))
    claims.finish(verdicts)
