"""How sure a reward model is and how often it is right: a table by strength, as plain cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_llm.report.numbers import figure, share
from lightning_llm.report.record import Node, Run
from lightning_llm.report.selection import Table

HEADS = ["the chosen one is better", "pairs", "right", "predicted", "calibration error"]


def calibrations(run: Run) -> list[tuple[Node, list[dict[str, Any]]]]:
    """The reward models of a run that were evaluated, each with the entries of its calibration.json."""
    found = []
    for stage in run.models:
        node = run.evaluation(stage)
        entries = node.files.get("calibration.json") if node else None
        if isinstance(entries, list) and entries:
            found.append((stage, [entry for entry in entries if isinstance(entry, dict)]))
    return found


def table(entries: Sequence[dict[str, Any]]) -> Table:
    """A row for all pairs, and one for each strength of the preference."""
    return Table(HEADS, [[str(entry.get("strength")), *_cells(entry)] for entry in entries])


def _cells(entry: dict[str, Any]) -> list[str]:
    shares = [entry.get(name) for name in ("accuracy", "predicted", "calibration_error")]
    return [figure(entry.get("pairs")), *(share(value) for value in shares)]
