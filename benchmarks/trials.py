"""Runs of recipes that a benchmark learns from, seed by seed: started, read, gathered, and written down with what was
claimed of them."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import claims
import machine

ELSEWHERE = ("store.", "runs=")  # overrides that say where things lie, not what is done


def run(*words: str) -> Path:
    """The folder of a run; what the store holds is not made again. A run that fails is the end of this."""
    with subprocess.Popen(machine.command("run", *words), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [line.strip() for line in process.stdout]
    if process.returncode:
        sys.exit(f"{' '.join(words)}: exit code {process.returncode}")
    return Path(lines[-1])


def read(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text("utf-8"))


def validation_curve(artifact: Path) -> list[tuple[float, float]]:
    """Held-out loss on the way of a stage: (tokens, nats per token)."""
    lines = map(json.loads, (artifact / "metrics.jsonl").read_text("utf-8").splitlines())
    return [(line["tokens"], line["validation/loss"]) for line in lines if "validation/loss" in line]


# ---- several seeds ----


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Values, mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"values": list(values), "mean": statistics.fmean(values), "standard_deviation": deviation}


def spreads(per_seed: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The spread of each figure that every seed has."""
    names = [name for name in per_seed[0] if all(name in figures for figures in per_seed)]
    return {name: spread([figures[name] for figures in per_seed]) for name in names}


# ---- a script ----


def arguments_of(about: str | None, result: Path) -> argparse.ArgumentParser:
    """What every benchmark of learning may be told."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--result", type=Path, default=result)
    machine.add_jobs(parser)
    parser.add_argument("overrides", nargs="*", help="as on lightning-llm's command line")
    return parser


def conditions(seeds: Sequence[int], overrides: Sequence[str]) -> dict[str, Any]:
    """What stands in front of all figures: how they were made."""
    return {
        "seeds": list(seeds),
        "overrides": [word for word in overrides if not word.startswith(ELSEWHERE)],
        "machine": machine.describe(),
    }


def write(result: Mapping[str, Any], path: Path) -> None:
    """A result as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def finish(judged: Sequence[Mapping[str, Any]]) -> None:
    """Say of each claim whether it holds; exit code 1 where one does not."""
    for entry in judged:
        value = "no figure" if entry["value"] is None else f"{entry['value']:.4g}"
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {value}")
    claims.finish([entry["holds"] for entry in judged])
