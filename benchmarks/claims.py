"""A claim is a sentence, the figure that decides it and its bounds; a result is claims and what was found with them."""

from __future__ import annotations

import json
import operator
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
KEEPS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le, "below": operator.lt}


def keeps(value: float, bounds: Mapping[str, float]) -> bool:
    """Whether a value is within bounds by name; differences of rounding do not count."""
    return all(KEEPS[name](round(value, 9), bound) for name, bound in bounds.items())


def claim(says: str, value: float, figures: Mapping[str, Any] | None = None, **bounds: float) -> dict[str, Any]:
    """A claim as results hold it, with the figures behind its value where there are any."""
    return {"claim": says, "value": round(value, 4), **bounds, "holds": keeps(value, bounds), **(figures or {})}


def worst(says: str, values: Sequence[float], **bounds: float) -> dict[str, Any]:
    """A claim that is decided by the least of the seeds' values."""
    return claim(f"{says}, worst seed", min(values), {"values": values}, **bounds)


def mean(says: str, values: Sequence[float], **bounds: float) -> dict[str, Any]:
    """A claim that is decided by the mean of the seeds' values."""
    return claim(f"{says}, mean over seeds", statistics.fmean(values), {"values": values}, **bounds)


def clearly(says: str, values: Sequence[float], **bounds: float) -> dict[str, Any]:
    """A claim that is decided by the mean of the seeds' values less two of its standard errors."""
    least = statistics.fmean(values) - 2 * statistics.stdev(values) / len(values) ** 0.5
    return claim(f"{says}, mean over seeds less two standard errors", least, {"values": values}, **bounds)


def write(path: Path, result: Mapping[str, Any]) -> None:
    """A result as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def write_part(path: Path | str, part: str, found: Mapping[str, Any]) -> bool:
    """Put one part's figures into a result, leave the others, print its claims -> whether all hold.

    Args:
        path: of the result; a name is that of one in results/.
    """
    path = path if isinstance(path, Path) else RESULTS / f"{path}.json"
    result = json.loads(path.read_text("utf-8")) if path.exists() else {}
    write(path, {**result, part: found})
    return say(found["claims"])


def say(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Print of each claim whether it holds, and by which figures -> whether all hold."""
    for entry in entries:
        values = [entry["value"]] if "value" in entry else entry["values"]
        figures = " ".join("no figure" if value is None else f"{value:.4g}" for value in values)
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {figures}", flush=True)
    return all(entry["holds"] for entry in entries)


def finish(verdicts: Sequence[bool]) -> None:
    """Exit code 1 where a claim does not hold."""
    sys.exit(not all(verdicts))
