"""How long does the demo take? Times the first run, the second, --help and --cfg job; writes results/demo.json.

    python benchmarks/demo.py [--clone] [overrides ...]

Runs in an empty folder, so nothing is reused from earlier runs. With --clone also `make demo` in a fresh clone (this
needs the network). Budgets are those of two calm cores; a busy machine takes several times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from claims import claim

RESULT = Path(__file__).resolve().parent / "results" / "demo.json"


@dataclass(frozen=True)
class Timing:
    """Wall and processor seconds of one process and its children."""

    wall: float
    cpu: float


def timed(line: list[str], folder: Path, *, python_path: str | None = str(machine.REPOSITORY)) -> Timing:
    """Run to the end, output shown only if it fails. From any folder Python finds this repository, or `python_path`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python_path:
        environment["PYTHONPATH"] = python_path
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(line)} failed with exit code {done.returncode}:\n{done.stdout[-4000:]}")
    return Timing(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure(overrides: list[str], repeats: int, clone: bool) -> list[dict[str, Any]]:
    """All claims, cheapest first: a mistake shows before the long run."""
    recipe = ["recipe=qwen2", "scale=nano", "until=dpo", *overrides]  # as the Makefile has it
    claims = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for says, arguments, below in (
            ("--help, CPU-seconds", ["--help"], 1.2),
            ("run --cfg job, CPU-seconds", ["run", *recipe, "--cfg", "job"], 2.0),
        ):
            line = machine.command(*arguments)
            timed(line, folder)  # fills the file cache
            seconds = [timed(line, folder).cpu for _ in range(repeats)]
            claims.append(
                claim(says, statistics.median(seconds), {"values": [round(s, 3) for s in seconds]}, below=below)
            )
        line = machine.command("run", *recipe)
        first, second = timed(line, folder), timed(line, folder)
        claims.append(
            claim("The job itself, wall seconds", first.wall, {"cpu_seconds": round(first.cpu, 1)}, below=360.0)
        )
        claims.append(
            claim("The second run, wall seconds", second.wall, {"cpu_seconds": round(second.cpu, 1)}, below=15.0)
        )
        if clone:
            timed(["git", "clone", "--quiet", "--no-hardlinks", str(machine.REPOSITORY), "clone"], folder)
            demo = timed(["make", "demo"], folder / "clone", python_path=None)
            claims.append(claim("make demo from a fresh clone, wall seconds", demo.wall, below=720.0))
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of the short commands; their median counts")
    parser.add_argument("--clone", action="store_true", help="also time make demo in a fresh clone")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="as on lightning-llm's command line")
    arguments = parser.parse_args()

    load = os.getloadavg()[0]  # before our own work: shows whether the machine was calm
    claims = measure(arguments.overrides, arguments.repeats, arguments.clone)
    result = {
        "overrides": arguments.overrides,
        "machine": {**machine.describe(), "load_before": round(load, 2)},
        "claims": claims,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    for entry in claims:
        verdict = "holds" if entry["holds"] else "FAILS"
        print(f"{verdict}  {entry['claim']}: {entry['value']:.4g} (below {entry['below']:g})")
    print(arguments.result)
    if not all(entry["holds"] for entry in claims):
        sys.exit(1)


if __name__ == "__main__":
    main()
