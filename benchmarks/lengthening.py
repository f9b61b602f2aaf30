"""Does a context that grows in steps cost short texts anything, are needles found, and is it worth something on long
ones? Recipe lengthening to its end, per seed. Writes results/lengthening.json and docs/images/context_lengthening.svg.

    python benchmarks/lengthening.py [--seeds 0 1 2] [--jobs 4] [overrides ...]

A run that its gate stops is read up to there. With stages.lengthen.stages.step.gate.short_context=1 it goes on to its
end; what is claimed is judged by the scale's own gate all the same.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import claims
import figures
import machine
import trials

from lightning_llm import compose, plan
from lightning_llm.stages.gate import NEEDLE, PERPLEXITY, worst_loss

RESULT = claims.RESULTS / "lengthening.json"
PICTURE = figures.IMAGES / "context_lengthening.svg"
RECIPE = "lengthening"
FIRST, LAST = "pretrain", "anneal"  # the steps are between them
GAIN = "late_loss/gain"
LATE = ("late_loss/full", "late_loss/short", GAIN, "late_loss/gain_error")
Stages = dict[str, dict[str, Any]]  # stage -> what `read_stage` says, in the order in which they were trained


def train(seed: int, overrides: Sequence[str]) -> Stages:
    """All stages of a seed that came to be; fewer than the recipe has where a gate stopped the run."""
    with tempfile.TemporaryDirectory() as runs:
        words = (f"recipe={RECIPE}", f"seed={seed}", *overrides, f"runs={runs}")
        code = subprocess.run(machine.command("run", *words)).returncode
        found = [path.parent for path in Path(runs).glob(f"{RECIPE}/*/run.json")]
        stages = read_stages(found[0]) if found else {}
        if code and not (code == 2 and was_stopped(found)):
            sys.exit(f"{' '.join(words)}: exit code {code}")
    if code:
        print(f"seed {seed}: STOPPED by its gate after {list(stages)[-1]}, figures are up to there", flush=True)
    return stages


def gate() -> float:
    """The share by which the recipe lets perplexity rise over all steps so far, at the scale nano."""
    bound = plan(compose(RECIPE)).recipe.stages["lengthen1.step"].gate.short_context
    assert bound is not None
    return bound


def was_stopped(runs: Sequence[Path]) -> bool:
    """Whether a gate has stopped a run."""
    return bool(runs) and trials.read(runs[0] / "run.json")["status"] == "stopped"


def read_stages(run: Path) -> Stages:
    """Every stage of a run that was trained and evaluated, all behind the first compared with that, as its gates do."""
    made = trials.read(run / "run.json")["stages"]
    stages: Stages = {}
    for name in (name for name in made if f"{name}.evaluate" in made):
        before = stages[FIRST]["metrics"] if FIRST in stages else None
        stages[name] = read_stage(run / "artifacts", name, before)
    return stages


def read_stage(artifacts: Path, name: str, before: Mapping[str, float] | None) -> dict[str, Any]:
    """One stage: settings, seconds, metrics of its evaluation, what its gate looks at, and its needles by length and
    depth.

    Args:
        before: metrics of the stage before the first step; none: it is that.
    """
    trained, evaluated = artifacts / name, artifacts / f"{name}.evaluate"
    asked = trials.read(evaluated / "stage.json")
    found = {
        "context": asked["settings"]["full_context"],
        "tokens": trials.read(trained / "stage.json")["settings"]["tokens"],
        "seconds": trials.read(trained / "stage.json")["seconds"]["total"] + asked["seconds"]["total"],
        "metrics": trials.read(evaluated / "metrics.json"),
    }
    if before is not None:
        found["short_context"] = worst_loss(before, found["metrics"])[1]
    if (evaluated / "needle.json").exists():
        found["needles"] = trials.read(evaluated / "needle.json")
    return found


# ---- several seeds ----


def measure(arguments: Namespace) -> trials.Result:
    """The result."""
    calls = [(seed, arguments.overrides) for seed in arguments.seeds]
    found = trials.side_by_side(train, calls, arguments.jobs)
    return summarise(dict(zip(arguments.seeds, found, strict=True)), gate())


def summarise(per_seed: Mapping[int, Stages], bound: float) -> dict[str, Any]:
    """Every stage with the spread of its figures over the seeds that reached it, needles after the last step, claims.

    Args:
        per_seed: seed -> what `train` found.
        bound: share by which a gate lets perplexity rise over all steps so far.
    """
    longest = max(per_seed.values(), key=len)
    stages = {name: stage_of([found[name] for found in per_seed.values() if name in found]) for name in longest}
    last = [name for name in stages if name not in (FIRST, LAST)][-1]
    maps = [found[last]["needles"] for found in per_seed.values() if "needles" in found.get(last, {})]
    return {
        "reached": {str(seed): list(found)[-1] for seed, found in per_seed.items()},
        "claims": judge(per_seed, last, bound),
        "gate": bound,
        "stages": stages,
        "needles": {"after": last, **mean_map(maps)} if maps else None,
    }


def stage_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A stage over the seeds."""
    metrics = trials.spreads([run["metrics"] for run in runs])
    summary = {
        "context": runs[0]["context"],
        "tokens": runs[0]["tokens"],
        "seconds": trials.spread([run["seconds"] for run in runs]),
        "perplexity": {n.removeprefix(PERPLEXITY): each for n, each in metrics.items() if n.startswith(PERPLEXITY)},
        "needle": {n.removeprefix(NEEDLE): each for n, each in metrics.items() if n.startswith(NEEDLE)},
        **{name: metrics[name] for name in LATE if name in metrics},
    }
    if "short_context" in runs[0]:
        summary["short_context"] = trials.spread([run["short_context"] for run in runs])
    return summary


def mean_map(maps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The shares found at each length and depth, means over the seeds."""
    rows = zip(*(each["found"] for each in maps), strict=True)
    found = [[statistics.fmean(cell) for cell in zip(*row, strict=True)] for row in rows]
    kept = ("lengths", "depths", "answer", "chance")
    return {
        **{name: maps[0].get(name) for name in kept},
        "trials": sum(each["trials"] for each in maps),
        "found": found,
    }


def judge(per_seed: Mapping[int, Stages], last: str, bound: float) -> list[dict[str, Any]]:
    """What the report asks of each step, and what a long context is for; neither holds where a seed was stopped."""
    rises = {
        f"{name}, seed {seed}": found["short_context"]
        for seed, stages in per_seed.items()
        for name, found in stages.items()
        if name not in (FIRST, LAST)
    }
    worst = max(rises, key=lambda step: rises[step])
    short = next(iter(per_seed.values()))[FIRST]["context"]
    ended = {seed: stages for seed, stages in per_seed.items() if LAST in stages}
    gains = [stages[last]["metrics"].get(GAIN) for stages in ended.values()]
    gains = [gain for gain in gains if gain is not None]  # no document may be as long as the context
    rise = claims.claim(
        "The steps so far raise perplexity at the first context by no more than a gate allows (share), worst step",
        rises[worst],
        {"worst": worst},
        at_most=bound,
    )
    says = f"After the last step late tokens are predicted better with all of the context than with {short} tokens"
    gain = claims.worst(f"{says} (nats)", gains or [math.nan], above=0.0) | {"values": gains}
    if not gains:
        gain["value"] = None
    if stopped := [seed for seed in per_seed if seed not in ended]:
        rise, gain = ({**entry, "holds": False, "stopped": stopped} for entry in (rise, gain))
    return [rise, gain]


# ---- what docs/methods/context_lengthening.md shows ----


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of stages: mean and standard deviation over the seeds that reached them."""
    first = next(iter(result["stages"].values()))
    domains = list(first["perplexity"])
    head = ["stage", "context", *domains, "worst rise", "late tokens: gain, nats", "needles found", "seconds"]
    rows = []
    for name, found in result["stages"].items():
        seeds = len(found["seconds"]["values"])
        rows.append(
            [
                name if seeds == len(result["reached"]) else f"{name} ({seeds} of {len(result['reached'])} seeds)",
                str(found["context"]),
                *(figures.shown(found["perplexity"].get(domain), 1) for domain in domains),
                figures.by_seed(found["short_context"], "+.1%") if "short_context" in found else "",
                figures.shown(found.get(GAIN), signed=True),
                f"{statistics.fmean(each['mean'] for each in found['needle'].values()):.0%}" if found["needle"] else "",
                f"{found['seconds']['mean']:.0f}",
            ]
        )
    return figures.lines_of_table(head, rows)


def draw(result: Mapping[str, Any]) -> None:
    """Left: how far the perplexity of the worst domain is above what it was before the first step, a dot a seed.
    Right: where needles were found after the last step, the mean over the seeds."""
    compared = {name: found for name, found in result["stages"].items() if "short_context" in found}
    with figures.drawing(PICTURE, columns=2, size=(10.5, 3.8)) as [changes, needles]:
        for place, found in enumerate(compared.values()):
            rise = found["short_context"]
            changes.bar(place, rise["mean"], width=0.6, color="C0", alpha=0.5)
            figures.dots(changes, place, rise["values"])
        changes.axhline(0, color="black", linewidth=0.8)
        changes.axhline(result["gate"], color="C3", linewidth=1, linestyle=":", label=f"the gate: {result['gate']:.0%}")
        ticks = [LAST if name == LAST else f"{found['context']}" for name, found in compared.items()]
        changes.set_xticks(range(len(ticks)), ticks)
        changes.yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
        short = result["stages"][FIRST]["context"]
        changes.set(xlabel="step to a context of so many tokens", ylabel=f"perplexity at {short} tokens, worst domain")
        changes.set_title("against the stage before the first step", fontsize=9)
        changes.legend(fontsize=8)
        if result["needles"]:
            _draw_needles(needles, result["needles"])
        else:
            needles.set_axis_off()


def _draw_needles(axes: Any, grid: Mapping[str, Any]) -> None:
    columns = list(zip(*grid["found"], strict=True))  # depth by length
    image = axes.imshow(columns, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    for row, cells in enumerate(columns):
        for column, share in enumerate(cells):
            colour = "white" if share < 0.6 else "black"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(grid["lengths"])), grid["lengths"])
    axes.set_yticks(range(len(grid["depths"])), [f"{depth:.0%}" for depth in grid["depths"]])
    axes.set(xlabel="length, tokens", ylabel="depth of the needle")
    chance = "" if grid["chance"] is None else f"; by chance {grid['chance']:.2g}"
    axes.set_title(f"needles found after {grid['after']}{chance}", fontsize=9)
    axes.figure.colorbar(image, ax=axes)


if __name__ == "__main__":
    trials.publish(__doc__, RESULT, measure, table, draw)
