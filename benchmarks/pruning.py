"""Is a pruned model a better beginning than random weights? AFM's claim, at equal tokens of the small model: pruned by
magnitudes, by activations and by learnt masks, against from scratch, and with the parent as teacher, per seed. Writes
results/pruning.json and docs/images/pruning.svg.

    python benchmarks/pruning.py [--seeds 0 1 2] [overrides ...]

All arms of a seed share the parent, which the store holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine
from claims import claim
from learning import spread

RESULT = Path(__file__).resolve().parent / "results" / "pruning.json"
PICTURE = machine.REPOSITORY / "docs" / "images" / "pruning.svg"
PLAIN = ["stages.core.learns_from=null", "objective@stages.core.objective=causal_lm"]
RANDOM = ["stages.core.starts_from=null", "+model@stages.core.model=afm_on_device"]
RANDOM += ["stages.core.model.intermediate_size=120"]  # as many as are left of 352
FROM_PARENT = ["stages.prune.starts_from=parent"]
ARMS = {  # arm -> what is typed
    "from scratch": [*PLAIN, *RANDOM],
    "magnitude": [*PLAIN, *FROM_PARENT, "prune@stages.prune.method=magnitude"],
    "activation": [*PLAIN, *FROM_PARENT, "prune@stages.prune.method=activation"],
    "learnt masks": PLAIN,
    "from scratch, distilled": RANDOM,
    "learnt masks, distilled": [],
}
BASELINE = "from scratch"
COLOURS = ("#23262b", "#c98b3a", "#4f9a6b", "#3f74b5", "#959aa3", "#a4508b")  # of the arms


def train(seed: int, arm: str, overrides: list[str]) -> Path:
    """The run folder of one arm."""
    words = ["recipe=pruning", f"seed={seed}", "until=core", *ARMS[arm], *overrides]
    with subprocess.Popen(machine.command("run", *words), stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        lines = [line.strip() for line in run.stdout]
    if run.returncode:
        sys.exit(f"{arm}, seed {seed}: exit code {run.returncode}")
    return Path(lines[-1])


def read(folder: Path) -> dict[str, Any]:
    """Of each stage that a run has: held-out loss on its way [(tokens, nats per token)], and what it cost."""
    found = {}
    for name in ("parent", "masks", "prune", "core.teacher", "core"):
        artifact = folder / "artifacts" / name
        if not artifact.exists():
            continue
        record = json.loads((artifact / "stage.json").read_text())
        journal = artifact / "metrics.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        found[name] = {
            "curve": [(line["tokens"], line["validation/loss"]) for line in lines if "validation/loss" in line],
            "seconds": record["seconds"]["total"],
            "metrics": record["metrics"],
        }
    return found


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Losses of all arms and seeds, and how AFM's claim stands.

    Args:
        runs: arm -> what `read` says of each seed.
    """
    arms = {}
    for arm, seeds in runs.items():
        curves = [run["core"]["curve"] for run in seeds]
        arms[arm] = {
            "tokens": [tokens for tokens, _ in curves[0]],
            "curve": [statistics.fmean(at) for at in zip(*([loss for _, loss in c] for c in curves), strict=True)],
            "before": spread([curve[0][1] for curve in curves]),
            "after": spread([curve[-1][1] for curve in curves]),
            "seconds": spread([sum(s["seconds"] for name, s in run.items() if name != "parent") for run in seeds]),
        }
    scratch = arms[BASELINE]["after"]["values"]
    claims = []
    for arm in arms:
        if arm != BASELINE:
            gains = [there - here for there, here in zip(scratch, arms[arm]["after"]["values"], strict=True)]
            says = f"{arm}: at equal tokens below the held-out loss of {BASELINE}, on each seed (nats, the least)"
            claims.append(claim(says, min(gains), spread(gains), above=0.0))
    hard = [run["masks"]["metrics"]["masks/hardness"] for run in runs["learnt masks"]]
    return {
        "claims": claims,
        "arms": arms,
        "parent": spread([run["parent"]["curve"][-1][1] for run in runs["learnt masks"]]),
        "masked": spread([run["masks"]["curve"][-1][1] for run in runs["learnt masks"]]),
        "masks/hardness": spread(hard),
    }


def picture(result: dict[str, Any]) -> str:
    """Held-out loss of the small model over its tokens, the mean of the seeds, an arm a line."""
    arms = result["arms"]
    last = max(arm["tokens"][-1] for arm in arms.values())
    shown = {
        name: [(t, y) for t, y in zip(arm["tokens"], arm["curve"], strict=True) if t or y < 5]
        for name, arm in arms.items()
    }
    losses = [loss for points in shown.values() for tokens, loss in points if tokens]
    low, high = min([*losses, result["parent"]["mean"]]) - 0.05, max(losses) + 0.05

    def x(tokens: float) -> float:
        return 70 + 420 * tokens / last

    def y(loss: float) -> float:
        return 330 - 290 * (min(loss, high) - low) / (high - low)

    body = []
    for step in range(int(low * 4) + 1, int(high * 4) + 1):
        body.append(f'<line x1="70" x2="490" y1="{y(step / 4):.1f}" y2="{y(step / 4):.1f}" class="grid"/>')
        body.append(f'<text x="62" y="{y(step / 4) + 4:.1f}" text-anchor="end">{step / 4:.2f}</text>')
    for share in (0, 0.5, 1):
        body.append(f'<text x="{x(share * last):.1f}" y="350" text-anchor="middle">{share * last / 1000:.0f}k</text>')
    parent = y(result["parent"]["mean"])
    body.append(f'<line x1="70" x2="490" y1="{parent:.1f}" y2="{parent:.1f}" class="parent"/>')
    body.append(f'<text x="74" y="{parent - 5:.1f}">the parent, {result["parent"]["mean"]:.3f}</text>')
    ends = sorted(arms, key=lambda name: arms[name]["curve"][-1])
    for (name, points), colour in zip(shown.items(), COLOURS, strict=False):
        line = " ".join(f"{x(tokens):.1f},{y(loss):.1f}" for tokens, loss in points)
        body.append(f'<polyline points="{line}" stroke="{colour}"/>')
        place = 150 + 24 * ends.index(name)
        body.append(f'<text x="505" y="{place}" style="fill:{colour}">{arms[name]["curve"][-1]:.3f}  {name}</text>')
    style = (
        "text{font:13px sans-serif;fill:#23262b}polyline{fill:none;stroke-width:2}"
        ".grid{stroke:#e3e1dc}.parent{stroke:#959aa3;stroke-dasharray:4 4}"
    )
    seeds = len(result["arms"][BASELINE]["after"]["values"])
    title = f"Held-out loss of the small model over its tokens, nats a token, mean of {seeds} seeds"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 365" role="img">'
        f'<style>{style}</style><rect width="700" height="365" fill="#fff"/><text x="20" y="20">{title}</text>'
        f"{''.join(body)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--result", type=Path, default=RESULT)
    machine.add_jobs(parser)
    parser.add_argument("overrides", nargs="*", help="as on lightning-llm's command line")
    arguments = parser.parse_args()

    calls = [(seed, arm, arguments.overrides) for seed in arguments.seeds for arm in ARMS]
    folders = dict(zip([call[:2] for call in calls], machine.side_by_side(train, calls, arguments.jobs), strict=True))
    runs = {arm: [read(folders[seed, arm]) for seed in arguments.seeds] for arm in ARMS}
    result = {
        "recipe": "pruning",
        "scale": "nano",
        "overrides": [word for word in arguments.overrides if not word.startswith(("store.", "runs="))],
        "seeds": arguments.seeds,
        "machine": machine.describe(),
        **summarise(runs),
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.result == RESULT:
        PICTURE.write_text(picture(result), "utf-8")
    for entry in result["claims"]:
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {entry['value']:.4g}")


if __name__ == "__main__":
    main()
