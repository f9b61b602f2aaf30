"""The page's facts as Markdown, for a pull request or a terminal: tables and samples, no drawings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_llm.report import charts, sections
from lightning_llm.report.calibration import calibrations
from lightning_llm.report.calibration import table as calibration_table
from lightning_llm.report.comparison import differences, environment, recipe_text
from lightning_llm.report.needles import GATE_HEADS, gate_rows, needle_grids
from lightning_llm.report.needles import table as needle_table
from lightning_llm.report.numbers import NOTHING, duration, figure, quantity, size
from lightning_llm.report.record import Run, visible
from lightning_llm.report.selection import selections
from lightning_llm.report.selection import tables as selection_tables


def write_markdown(runs: Sequence[Run], output: Path) -> None:
    """Write the page's facts about `runs`, over what was there."""
    output.write_text("\n".join(_lines(runs)) + "\n", encoding="utf-8")


def _lines(runs: Sequence[Run]) -> Iterator[str]:
    yield f"# {_plain(sections.title(runs))}"
    for line in sections.missing(runs):
        yield f"\n> Incomplete: {_plain(line)}"
    yield from _overview(runs)
    for run in runs:
        which = f": {_plain(run.name)}" if len(runs) > 1 else ""
        yield f"\n## Stages{which}\n"
        rows = [
            [
                f"**{node.name}**" if node.kind == "train" else node.name,
                node.kind,
                quantity(node.get("tokens")) if node.kind in ("train", "score") else "",
                figure(node.get("steps")) if node.kind == "train" else "",
                duration(node.seconds) if node.is_made else "",
                size(node.bytes) if node.bytes else "",
                str((node.record or {}).get("key") or "")[:10],
                sections.state(node),
            ]
            for node in run.nodes
        ]
        yield from _table(["stage", "kind", "tokens", "steps", "time", "size", "key", "state"], rows)
        names = charts.metric_names([run])
        shown = run.evaluated
        if names:
            yield f"\n## Evaluation{which}\n"
            table = [[name, *(sections.metric_value(run.results(stage), name) for stage in shown)] for name in names]
            yield from _table(["metric", *(stage.name for stage in shown)], table)
        for stage, entries in calibrations(run):
            yield f"\n## Calibration: {_plain(stage.name)}{which}\n"
            found = calibration_table(entries)
            yield from _table(found.heads, found.rows)
        for stage, grid in needle_grids(run):
            yield f"\n## Needles found: {_plain(stage.name)}{which}\n"
            found = needle_table(grid)
            yield from _table(found.heads, found.rows)
        if asked := gate_rows(run):
            yield f"\n## Gates{which}\n"
            yield from _table(GATE_HEADS, asked)
        for node in selections(run):
            yield f"\n## Who won where: {_plain(node.name)}{which}"
            for found in selection_tables(node):
                yield ""
                yield from _table(found.heads, found.rows)
        yield from _samples(run, which)
        if run.recipe:
            yield f"\n## Recipe{which}\n"
            yield from _fenced(recipe_text(run), "yaml")
        if facts := environment(run):
            yield f"\n## Environment{which}\n"
            yield from _table(["", ""], [[name, value] for name, value in facts.items()])


def _overview(runs: Sequence[Run]) -> Iterator[str]:
    facts = [
        {
            "run": run.name,
            "folder": run.folder_name,
            "seed": str(run.seed),
            "date": sections.date(run) or NOTHING,
            **sections.totals(run),
        }
        for run in runs
    ]
    for key, values in differences(runs).items():
        for fact, value in zip(facts, values, strict=True):
            fact.setdefault(key, value)
    names = [name for name in facts[0] if any(fact[name] != NOTHING for fact in facts)]
    yield ""
    yield from _table(["", *(fact["run"] for fact in facts)], [[n, *(fact[n] for fact in facts)] for n in names[1:]])


def _samples(run: Run, which: str) -> Iterator[str]:
    for stage in run.models:
        node = run.evaluation(stage)
        found = node.files.get("samples.json") if node else None
        if isinstance(found, list) and found:
            yield f"\n## Samples after {_plain(stage.name)}{which}"
            for sample in found:
                for part in ("prompt", "reference", "response"):
                    if sample.get(part) is not None:
                        yield f"\n{part}\n"
                        yield from _fenced(visible(sample[part]))


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(_cell(head) for head in heads)} |"
    yield f"| {' | '.join('---' for _ in heads)} |"
    for row in rows:
        yield f"| {' | '.join(_cell(cell) for cell in row)} |"


def _cell(value: Any) -> str:
    return _plain(str(value)).replace("|", "\\|")


def _plain(text: str) -> str:
    """No line breaks and no HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")


def _fenced(text: str, language: str = "text") -> Iterator[str]:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}{language}\n{text.rstrip()}\n{fence}"
