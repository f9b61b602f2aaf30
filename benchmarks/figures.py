"""Figures as pages show them: Markdown tables of means and deviations, and pictures that are the same from the same
figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import numpy as np

IMAGES = machine.REPOSITORY / "docs" / "images"


def shown(found: Mapping[str, Any] | None, digits: int = 3, *, signed: bool = False) -> str:
    """Mean and standard deviation of a spread, as tables have them."""
    if found is None:
        return "-"
    text = f"{found['mean']:{'+' if signed else ''}.{digits}f}"
    deviation = found["standard_deviation"]
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def by_seed(found: Mapping[str, Any], form: str = "+.3f", between: str = " ") -> str:
    """The values of a spread, one after another."""
    return between.join(f"{value:{form}}" for value in found["values"])


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


def dots(axes: Any, x: Any, y: Any, colour: str = "black") -> None:
    """A dot for each seed; x or y is the same for all of them."""
    axes.plot(*np.broadcast_arrays(x, y), linestyle="", marker="o", markersize=3, color=colour)


def draw_bars(axes: Any, changes: Mapping[str, Any]) -> None:
    """A bar of its mean for each change, from above, and a dot for each seed.

    Args:
        changes: what it says at the left -> spread.
    """
    for place, change in enumerate(changes.values()):
        axes.barh(place, change["mean"], height=0.6, alpha=0.6)
        dots(axes, change["values"], place)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(changes)), list(changes))
    axes.invert_yaxis()


def draw_curves(picture: Path, arms: Mapping[str, Any], before: tuple[str, float], tokens: str) -> None:
    """The mean loss of every arm over its tokens, with a dot for each seed at its end, and a line at the loss of the
    model before them. What lies above all that comes after a stage's first steps, as random weights do, is outside.

    Args:
        arms: each with `tokens`, `curve` and the spread `after`.
        before: what the model is called, and its loss.
        tokens: what is counted at the bottom.
    """
    inside: list[float] = []
    with drawing(picture, size=(7.5, 4)) as [axes]:
        for place, (arm, found) in enumerate(arms.items()):
            label = f"{arm}: {found['after']['mean']:.3f}"
            axes.plot(found["tokens"], found["curve"], color=f"C{place}", linewidth=1.6, label=label)
            dots(axes, found["tokens"][-1], found["after"]["values"], f"C{place}")
            inside += [*found["after"]["values"], *found["curve"][1:]]
        margin = 0.05 * (max(inside) - min(inside))
        axes.set_ylim(min(inside) - margin, max(inside) + margin)
        name, loss = before
        axes.axhline(loss, color="black", linewidth=0.8, linestyle=":", label=f"{name}: {loss:.3f}")
        axes.set(xlabel=tokens, ylabel="held-out loss, nats per token")
        axes.legend(fontsize=8)
