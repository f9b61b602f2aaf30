"""Is a mixture of experts that is made of a trained dense model a better beginning than random weights? At equal tokens
after the dense model, per seed: expert slices with half of them drawn anew, slices as they are, whole copies, the dense
model trained on, and a mixture from scratch. Writes results/upcycling.json and docs/images/upcycling.svg.

    python benchmarks/upcycling.py [--seeds 0 1 2] [--jobs 4] [overrides ...]

All arms of a seed share data and dense model, which the store holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import claims
import figures
import machine
import trials

from lightning_llm.models.families import read_config
from lightning_llm.models.size import parameter_counts

RESULT = claims.RESULTS / "upcycling.json"
PICTURE = figures.IMAGES / "upcycling.svg"
STAGE = "mixture"  # the one that is compared
COPIES = ["experts=copies", "moe_intermediate_size=null", "shared_expert_intermediate_size=null"]
ARMS = {  # arm -> what is typed
    "from scratch": [f"stages.{STAGE}.starts_from=null", f"+model@stages.{STAGE}.model=qwen2_57b_a14b"],
    "slices, half drawn anew": [],
    "slices as they are": ["stages.upcycle.reinitialised=0"],
    "whole copies": [f"stages.upcycle.{word}" for word in COPIES],
    "dense, trained on": [f"stages.{STAGE}.starts_from=pretrain"],
}
BASELINE, UPCYCLED = "from scratch", "slices, half drawn anew"
BESIDE = (f"stages.{STAGE}.evaluate=false", "stages.upcycle.evaluate=false", "stages.pretrain.evaluate=false")


def measure(seed: int, arm: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One arm's held-out loss on its way, parameters and seconds; and where the dense model has ended."""
    words = ("recipe=upcycling", f"seed={seed}", f"until={STAGE}", *BESIDE)
    artifacts = trials.run(*words, *ARMS[arm], *overrides) / "artifacts"
    record = trials.read(artifacts / STAGE / "stage.json")
    sizes = parameter_counts(read_config(artifacts / STAGE / "model"))
    found = {
        "curve": trials.validation_curve(artifacts / STAGE),
        "parameters": {name: sizes[name] for name in ("total", "active")},
        "seconds": record["seconds"]["total"],
    }
    if (artifacts / "pretrain").exists():
        found["dense"] = trials.validation_curve(artifacts / "pretrain")[-1][1]
    print(f"seed {seed}, {arm}: {found['curve'][0][1]:.3f} -> {found['curve'][-1][1]:.3f}", flush=True)
    return found


def summarise(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Losses of all arms with their spread, what each gains over the baseline within its seed, and what is claimed.

    Args:
        found: arm -> what `measure` says of each seed.
    """
    ends = {arm: [run["curve"][-1][1] for run in runs] for arm, runs in found.items()}
    arms = {}
    for arm, runs in found.items():
        losses = zip(*([loss for _, loss in run["curve"]] for run in runs), strict=True)
        arms[arm] = {
            "tokens": [tokens for tokens, _ in runs[0]["curve"]],
            "curve": [statistics.fmean(at) for at in losses],
            "before": trials.spread([run["curve"][0][1] for run in runs]),
            "after": trials.spread(ends[arm]),
            "gain": trials.spread([there - here for there, here in zip(ends[BASELINE], ends[arm], strict=True)]),
            "parameters": runs[0]["parameters"],
            "seconds": trials.spread([run["seconds"] for run in runs]),
        }
    gain = arms[UPCYCLED]["gain"]["values"]
    says = "An upcycled mixture is below one from random weights at equal tokens (held-out nats per token), worst seed"
    return {
        "claims": [claims.claim(says, min(gain), {"values": gain}, above=0.0)],
        "dense": trials.spread([run["dense"] for run in found[UPCYCLED]]),
        "arms": arms,
    }


# ---- what docs/methods/upcycling.md shows ----


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of arms: held-out nats before and after, mean and standard deviation over the seeds."""
    head = ["mixture", "parameters", "active", "nats before", "nats after", f"below `{BASELINE}`", "by seed"]
    rows = [
        [
            arm,
            *(f"{found['parameters'][name] / 1e6:.2f}M" for name in ("total", "active")),
            figures.shown(found["before"]),
            figures.shown(found["after"]),
            figures.shown(found["gain"], signed=True) if arm != BASELINE else "",
            " ".join(f"{value:+.3f}" for value in found["gain"]["values"]) if arm != BASELINE else "",
        ]
        for arm, found in result["arms"].items()
    ]
    return figures.lines_of_table(head, rows)


def draw(result: Mapping[str, Any]) -> None:
    """Held-out loss over the tokens that every arm sees, the mean of the seeds, with a dot a seed at its end."""
    with figures.drawing(PICTURE, size=(7.5, 4)) as [axes]:
        shown = []  # random weights begin where nothing else could be told apart
        for place, (arm, found) in enumerate(result["arms"].items()):
            ends = found["after"]["values"]
            axes.plot(found["tokens"], found["curve"], color=f"C{place}", label=f"{arm}: {found['after']['mean']:.3f}")
            figures.dots(axes, found["tokens"][-1], ends, f"C{place}")
            shown += [*ends, *(found["curve"] if arm != BASELINE else found["curve"][2:])]
        dense = result["dense"]["mean"]
        axes.axhline(dense, color="black", linewidth=0.8, linestyle=":", label=f"the dense model before: {dense:.3f}")
        margin = 0.05 * (max(shown) - min(shown))
        axes.set(xlabel="tokens after the dense model", ylabel="held-out loss, nats per token")
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.legend(fontsize=8)


def main() -> None:
    arguments = trials.arguments_of(__doc__, RESULT).parse_args()
    calls = [(seed, arm, arguments.overrides) for arm in ARMS for seed in arguments.seeds]
    measured = iter(machine.side_by_side(measure, calls, arguments.jobs))
    found = {arm: [next(measured) for _ in arguments.seeds] for arm in ARMS}
    result = {**trials.conditions(arguments.seeds, arguments.overrides), **summarise(found)}
    trials.write(result, arguments.result)
    print("\n".join(table(result)))
    if arguments.result == RESULT:
        draw(result)
    trials.finish(result["claims"])


if __name__ == "__main__":
    main()
