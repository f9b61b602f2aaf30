"""What the comparisons have in common: claims with a bound, the command line, the file of results."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
from interleave import Measurement

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 3  # calls of each worker that do not count
Measured = tuple[dict[str, Any], list[dict[str, Any]]]  # figures, claims


def claim(says: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """A sentence, the figure that decides it, and its bound."""
    bounds = {name: bound for name, bound in (("at_least", at_least), ("at_most", at_most)) if bound is not None}
    holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {"claim": says, "value": round(value, 4), **bounds, "holds": holds}


def figures(measurement: Measurement, ours: str = "ours") -> dict[str, Any]:
    """Of each worker its seconds, peak and versions, and how often ours fits into its CPU-seconds."""
    return {
        name: measurement.figures(name)
        | ({} if name == ours else {"cpu_ratio_to_ours": measurement.ratios(ours, name)})
        for name in measurement.calls
    }


def main(name: str, about: str, measure: Callable[[Path, int], Measured]) -> None:
    """Measure, write results/<name>.json, say what holds; exit code 1 if something does not.

    Args:
        measure: makes the figures, given a folder for its files and the number of calls.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20, help="of each worker, that count")
    parser.add_argument("--result", type=Path, default=RESULTS / f"{name}.json")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]  # before our own work: shows whether the machine was calm
    with tempfile.TemporaryDirectory() as folder:
        measured, claims = measure(Path(folder), arguments.calls)
    result = {
        "machine": {**machine.describe(), "load_before": round(load, 2)},
        "calls": arguments.calls,
        "claims": claims,
        "figures": measured,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    for entry in claims:
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {entry['value']:.4g}")
    print(arguments.result)
    if not all(entry["holds"] for entry in claims):
        sys.exit(1)
