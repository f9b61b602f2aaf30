"""Figures as pages show them: Markdown tables of means and deviations, and pictures that are the same from the same
figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine

IMAGES = machine.REPOSITORY / "docs" / "images"


def shown(found: Mapping[str, Any] | None, digits: int = 3, *, signed: bool = False) -> str:
    """Mean and standard deviation of a spread, as tables have them."""
    if found is None:
        return "-"
    text = f"{found['mean']:{'+' if signed else ''}.{digits}f}"
    deviation = found["standard_deviation"]
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def lines_of_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table's lines."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


@contextmanager
def drawing(picture: Path, *, columns: int = 1, size: tuple[float, float]) -> Iterator[list[Any]]:
    """Axes side by side, in a figure of `size` inches; the picture is written when they have been drawn on."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = picture.stem  # names inside do not change from one drawing to the next
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, columns, figsize=size, squeeze=False)
    axes = list(panels[0])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def dots(axes: Any, x: float, values: Sequence[float], colour: str = "black") -> None:
    """A dot for each seed, one above the other."""
    axes.plot([x] * len(values), values, linestyle="", marker="o", markersize=3, color=colour)
