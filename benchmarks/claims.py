"""A claim is a sentence, the figure that decides it and its bounds; a result is claims and what was found with them."""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Mapping
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


def write_part(benchmark: str, part: str, found: Mapping[str, Any]) -> bool:
    """Put one part's figures into results/<benchmark>.json, leave the others, print its claims -> whether all hold."""
    path = RESULTS / f"{benchmark}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result[part] = found
    path.write_text(json.dumps(result, indent=2) + "\n")
    for entry in found["claims"]:
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {entry['value']:.4g}", flush=True)
    return all(entry["holds"] for entry in found["claims"])


def finish(verdicts: list[bool]) -> None:
    """Exit code 1 where a claim does not hold."""
    sys.exit(not all(verdicts))
