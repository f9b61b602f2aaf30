"""Who won where: the tables of a stage that selects, as plain cells for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_llm.report.numbers import figure, share
from lightning_llm.report.record import Node, Run

HEADS = {  # entries of table.json -> heads of columns
    "samples": "responses",
    "prompts": "prompts",
    "complete": "ended",
    "score": "mean score",
    "right": "right",
    "best_or_tied": "among the best",
    "right_alone": "alone right",
    "kept": "kept",
}
SHARES = ("complete", "right", "best_or_tied", "right_alone")
PARTS = {"models": "model", "tasks": "task", "difficulty": "prompts with"}  # of table.json -> head of the first column


@dataclass(frozen=True)
class Table:
    """Heads and rows of cells; the first column names a row."""

    heads: list[str]
    rows: list[list[str]]


def selections(run: Run) -> list[Node]:
    """The stages of a run that have selected."""
    return [node for node in run.nodes if node.kind == "select" and isinstance(node.files.get("table.json"), dict)]


def tables(node: Node) -> Iterator[Table]:
    """By model, by task and by difficulty; columns that say nothing are left out."""
    content: dict[str, Any] = node.files["table.json"]
    for part, first in PARTS.items():
        entries = {name: entry for name, entry in (content.get(part) or {}).items() if isinstance(entry, dict)}
        if not entries:
            continue
        columns = [name for name in HEADS if any(entry.get(name) is not None for entry in entries.values())]
        models = list(dict.fromkeys(model for entry in entries.values() for model in entry.get("kept_of") or {}))
        heads = [first, *(HEADS[name] for name in columns), *(f"of {model}" for model in models)]
        rows = []
        for name, entry in entries.items():
            cells = [_cell(column, entry.get(column)) for column in columns]
            rows.append([name, *cells, *(figure((entry.get("kept_of") or {}).get(model)) for model in models)])
        yield Table(heads, rows)


def _cell(column: str, value: Any) -> str:
    return share(value) if column in SHARES else figure(value)
