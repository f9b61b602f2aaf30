"""Where in how long a text a key was found again: a map of depth by length for each model, and the same as a table;
and what gates have made of it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from lightning_llm.report.numbers import figure, is_number, share
from lightning_llm.report.record import Node, Run
from lightning_llm.report.selection import Table

SCALE = [[0, "#b5526b"], [0.5, "#d9b46a"], [1, "#3c938a"]]  # none found, all found
GATE_ASKS = {  # setting -> what a gate asks by it, and which way
    "short_context": ("rise of perplexity on short texts, worst domain", "at most"),
    "needle": ("needles found, worst length", "at least"),
}
GATE_HEADS = ["stage", "asked", "wanted", "found", "verdict"]
GAP = 0.05  # between two maps, as a share of the width


def needle_grids(run: Run) -> list[tuple[Node, dict[str, Any]]]:
    """The models of a run that were asked for needles, each with its needle.json."""
    found = []
    for stage in run.models:
        node = run.evaluation(stage)
        grid = node.files.get("needle.json") if node else None
        if isinstance(grid, dict) and grid.get("found"):
            found.append((stage, grid))
    return found


def answers_said(grids: Sequence[dict[str, Any]]) -> str:
    """What counts as found in some maps, and how often it is by chance: `the model spells it (by chance .0001)`."""
    kinds = {grid.get("answer"): grid.get("chance") for grid in grids}
    said = []
    for answer, chance in kinds.items():
        found = "it is likelier than all wrong ones" if answer == "likelihood" else "the model spells it"
        said.append(found + (f" (by chance {chance:g})" if chance is not None else ""))
    return " or ".join(dict.fromkeys(said))


def gate_rows(run: Run) -> list[list[str]]:
    """What each gate of a run has asked and found, a row for each of its questions."""
    rows = []
    for node in run.nodes:
        content = node.files.get("gate.json") if node.kind == "gate" else None
        if not isinstance(content, dict):
            continue
        stage = node.name.removesuffix(".gate")
        for name, (question, bound) in GATE_ASKS.items():
            if (wanted := (content.get("wanted") or {}).get(name)) is not None:
                value = (content.get("found") or {}).get(f"gate/{name}")
                holds = is_number(value) and (value <= wanted if bound == "at most" else value >= wanted)
                verdict = "passed" if holds else "stopped the run"
                rows.append([stage, question, f"{bound} {share(wanted)}", share(value), verdict])
    return rows


def table(grid: dict[str, Any]) -> Table:
    """A row for each depth, a column for each length."""
    heads = ["depth", *(f"{figure(length)} tokens" for length in grid["lengths"])]
    columns = zip(*grid["found"], strict=True)
    return Table(
        heads,
        [[share(depth), *map(share, cells)] for depth, cells in zip(grid["depths"], columns, strict=True)],
    )


def maps(found: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any] | None:
    """Maps side by side, in one Plotly figure.

    Args:
        found: title and needle.json of each.
    """
    if not found:
        return None
    traces, layout = [], {"annotations": [], "height": 360, "showlegend": False}
    width = (1 - GAP * (len(found) - 1)) / len(found)
    for place, (title, grid) in enumerate(found):
        number = "" if place == 0 else str(place + 1)
        left = place * (width + GAP)
        traces.append(
            {
                "type": "heatmap",
                "name": escape(title, quote=False),
                "x": [figure(length) for length in grid["lengths"]],
                "y": [f"{100 * depth:.0f}" for depth in grid["depths"]],
                "z": [list(row) for row in zip(*grid["found"], strict=True)],  # depth by length
                "zmin": 0,
                "zmax": 1,
                "colorscale": SCALE,
                "showscale": place == 0,
                "colorbar": {"title": {"text": "found"}, "tickformat": ".0%", "thickness": 12},
                "xaxis": f"x{number}",
                "yaxis": f"y{number}",
                "xgap": 2,
                "ygap": 2,
                "hovertemplate": "%{x} tokens, depth %{y} %: %{z:.0%}<extra></extra>",
            }
        )
        domain = [round(left, 4), round(min(left + width, 1.0), 4)]
        layout[f"xaxis{number}"] = {
            "title": {"text": "length, tokens"}, "type": "category", "domain": domain, "anchor": f"y{number}"
        }  # fmt: skip
        layout[f"yaxis{number}"] = {
            "title": {"text": "" if place else "depth, %"}, "type": "category", "autorange": "reversed",
            "anchor": f"x{number}",
        }  # fmt: skip
        layout["annotations"].append(
            {"text": escape(title, quote=False), "x": left + width / 2, "y": 1, "xref": "paper", "yref": "paper",
             "xanchor": "center", "yanchor": "bottom", "showarrow": False}
        )  # fmt: skip
    return {"data": traces, "layout": layout}
