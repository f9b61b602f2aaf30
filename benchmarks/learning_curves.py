"""Pictures of models that learn from their own responses: curves of what was followed over the responses drawn so far,
and what each arm has changed of its seed's model."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import draw_bars, drawing
from trials import journal

FIGURES = ("reward/mean", "kl/reference", "entropy", "responses/length")
HELD_OUT = "validation/reward/mean"
REWARDS = ("reward/mean", HELD_OUT)
ON_THE_WAY = {"reward/ties": statistics.fmean, "kl/iterate": max, "logps/gap_max": max}
POINTS = 32  # of a curve, at most: each is a mean over neighbouring steps
Curve = dict[str, list[float]]  # samples, value


def followed(artifact: Path, responses_per_sample: float, most: float = 1.0) -> dict[str, Curve]:
    """The curves of one stage.

    Args:
        responses_per_sample: drawn for each prompt of a step; less than a prompt has where several passes go over it.
        most: a response can earn; rewards are given as shares of it.
    """
    lines = journal(artifact)
    steps = [line for line in lines if "samples" in line]
    curves = {}
    for name in FIGURES:
        points = [(line["samples"] * responses_per_sample, line[name]) for line in steps if name in line]
        size, scale = -(-len(points) // POINTS), most if name in REWARDS else 1.0
        parts = [points[at : at + size] for at in range(0, len(points), size or 1)]
        curves[name] = {
            "samples": [round(part[-1][0]) for part in parts],
            "value": [round(statistics.fmean(value for _, value in part) / scale, 5) for part in parts],
        }
    by_step = {0: 0.0} | {line["step"]: line["samples"] * responses_per_sample for line in steps}
    held_out = [line for line in lines if HELD_OUT in line and line["step"] in by_step]
    curves[HELD_OUT] = {
        "samples": [round(by_step[line["step"]]) for line in held_out],
        "value": [round(line[HELD_OUT] / most, 5) for line in held_out],
    }
    return curves


def on_the_way(artifact: Path) -> dict[str, float]:
    """The mean share of a step's prompts that tie, the largest KL divergence from the iterate that has drawn, and the
    largest difference of sampler and trainer in a token's log-probability; those that the stage has written down."""
    lines = journal(artifact)
    found = {name: [line[name] for line in lines if name in line] for name in ON_THE_WAY}
    return {name: ON_THE_WAY[name](values) for name, values in found.items() if values}


def mean(per_seed: Sequence[Mapping[str, Curve]]) -> dict[str, Any]:
    """Mean, lowest and highest over the seeds at each point; the seeds have the same points."""
    together: dict[str, dict[str, list[float]]] = {}
    for name in per_seed[0]:
        values: dict[float, list[float]] = defaultdict(list)
        for curves in per_seed:
            for at, value in zip(curves[name]["samples"], curves[name]["value"], strict=True):
                values[at].append(value)
        together[name] = {
            "samples": list(values),
            "mean": [round(statistics.fmean(each), 5) for each in values.values()],
            "lowest": [min(each) for each in values.values()],
            "highest": [max(each) for each in values.values()],
        }
    return together


def draw(arms: Mapping[str, Mapping[str, Any]], figures: Mapping[str, str], picture: Path) -> None:
    """One axis for each figure, a line for each arm that was followed, with the range of its seeds.

    Args:
        arms: each with its `curves`.
        figures: name -> label of its axis.
    """
    with drawing(picture, columns=len(figures), size=(4.8 * len(figures), 3.8)) as axes:
        for axis, (name, label) in zip(axes, figures.items(), strict=True):
            for arm, found in arms.items():
                if curve := found["curves"].get(name):
                    [line] = axis.plot(curve["samples"], curve["mean"], label=arm, linewidth=1.6)
                    bounds = (curve["lowest"], curve["highest"])
                    axis.fill_between(curve["samples"], *bounds, color=line.get_color(), alpha=0.12, linewidth=0)
            axis.set(xlabel="responses drawn", ylabel=label)
        axes[-1].legend(fontsize=8, frameon=False)


def draw_changes(arms: Mapping[str, Mapping[str, Any]], figures: Mapping[str, str], picture: Path) -> None:
    """One axis for each figure: a bar of its mean change for each arm, and a dot for each seed.

    Args:
        arms: each with its `change`.
        figures: name -> label of its axis.
    """
    size = (1.5 + 3.6 * len(figures), 0.9 + 0.45 * len(arms))
    with drawing(picture, columns=len(figures), size=size) as axes:
        for axis, (name, label) in zip(axes, figures.items(), strict=True):
            draw_bars(axis, {arm: found["change"][name] for arm, found in arms.items()})
            axis.set(xlabel=f"change of {label}")
            if axis is not axes[0]:
                axis.set_yticklabels([])
