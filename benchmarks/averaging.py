"""Is an average of models worth more than one of them? Three DPO models of an SFT model stopped half-way, which differ
in the order of their pairs or in beta, and what they become together. Writes results/averaging.json and
docs/images/averaging.svg.

    python benchmarks/averaging.py [--seeds 0 1 2] [--jobs 4] [overrides ...]

All models of a seed come from one SFT model. Every merge is a stage of kind `merge`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import claims
import figures
import trials
from half_way import DRAWN, EXACT, HALF_WAY, KL, HeldOut

RESULT = claims.RESULTS / "averaging.json"
PICTURE = figures.IMAGES / "averaging.svg"
DPO = (  # the recipe's own as nano has them, with its 20 steps of warm-up: what is typed is not scaled
    "starts_from=sft", "examples=2000", "context=1024", "batch_tokens=2048", "lr.peak=1.5e-4",
    "lr.warmup_share=0.45511111", "objective.nll_weight=1.0",
)  # fmt: skip
SINGLE = {  # stage -> in what it differs from the recipe's `dpo`
    "dpo": None,
    "order": "seed_offset=1",
    "strength": "objective.beta=0.3",
}
MERGED = {  # stage -> method, its models, its settings
    "linear": ("linear", list(SINGLE), ()),
    "slerp": ("slerp", list(SINGLE), ()),
    "ties": ("ties", list(SINGLE), ()),
    "half": ("liti", ["linear"], ("method.eta=0.5",)),
}
TITLES = {
    "sft": "SFT, where all began", "dpo": "DPO", "order": "DPO, another order", "strength": "DPO, beta 0.3",
    "linear": "`linear` of the three", "slerp": "`slerp` of the three", "ties": "`ties` of the three",
    "half": "`liti` of `linear`, half of the way",
}  # fmt: skip


def words() -> list[str]:
    """All that is typed; models are measured here, not by their stages."""
    typed = [*HALF_WAY, "stages.dpo.evaluate=false"]
    for name, change in SINGLE.items():
        if change is not None:
            settings = (*DPO, change, "evaluate=false")
            typed += [f"+stage@stages.{name}=dpo", *(f"stages.{name}.{setting}" for setting in settings)]
    for name, (method, models, settings) in MERGED.items():
        typed += [f"+stage@stages.{name}=merge", f"merge@stages.{name}.method={method}"]
        typed += [f"stages.{name}.models=[{','.join(models)}]", f"stages.{name}.evaluate=false"]
        typed += [] if method == "linear" else [f"stages.{name}.starts_from=sft"]
        typed += [f"stages.{name}.{setting}" for setting in settings]
    return typed


def train(seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Held-out figures of all models of a seed, and the angle between what the three have learnt, in degrees."""
    found: dict[str, Any] = {}
    for last in MERGED:  # each with what it needs
        folder = trials.run("recipe=qwen2", f"seed={seed}", f"until={last}", *words(), *overrides)
        held_out = HeldOut(folder)
        found |= {name: held_out.figures(name) for name in ("sft", *SINGLE, last) if name not in found}
        record = trials.read(folder / "artifacts" / last / "stage.json")
        if last == "slerp":
            angle = record["metrics"]["task_vectors/angle"]
    print(f"seed {seed}: {[(name, round(each[EXACT], 3), round(each[KL], 2)) for name, each in found.items()]}")
    return {"models": found, "angle": angle}


def measure(arguments: Namespace) -> trials.Result:
    """The result."""
    calls = [(seed, arguments.overrides) for seed in arguments.seeds]
    return summarise(trials.side_by_side(train, calls, arguments.jobs))


def summarise(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every model with its spread and its change against the SFT model of its seed, and claims.

    Args:
        found: what `train` says of each seed.
    """
    models = {name: {"figures": trials.spreads([seed["models"][name] for seed in found])} for name in TITLES}
    for each in models.values():
        each["change"] = trials.changes(models["sft"]["figures"], each["figures"])
    gains = {name: models[name]["change"][EXACT]["values"] for name in TITLES}
    of_singles = [sum(each) / len(SINGLE) for each in zip(*(gains[name] for name in SINGLE), strict=True)]
    kls = {name: models[name]["figures"][KL]["values"] for name in ("half", "linear")}
    shares = [half / whole for half, whole in zip(kls["half"], kls["linear"], strict=True)]
    return {
        "claims": [
            claims.clearly(
                "`linear` gains more exact match than the three models do in the mean",
                trials.differences(gains["linear"], of_singles),
                above=0.0,
            ),
            claims.mean("Half of the way costs less than half of the KL (share of it)", shares, at_most=0.5),
        ],
        "overrides": words(),
        "angle": trials.spread([seed["angle"] for seed in found]),
        "models": models,
    }


# ---- what docs/methods/averaging.md shows ----


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of models, mean and standard deviation over the seeds."""
    head = ["model", "exact match", "right when drawn", "KL to SFT, nats a response", "change of exact match, by seed"]
    rows = []
    for name, title in TITLES.items():
        found = result["models"][name]
        values = [figures.shown(found["figures"][each]) for each in (EXACT, DRAWN, KL)]
        rows.append([title, *values, figures.by_seed(found["change"][EXACT]) if name != "sft" else ""])
    return figures.lines_of_table(head, rows)


def draw(result: Mapping[str, Any]) -> None:
    """Exact match of greedy answers, and share of drawn ones that are right, over the KL; a dot a seed."""
    shown = {EXACT: "exact match, against the SFT model", DRAWN: "right when drawn, against the SFT model"}
    with figures.drawing(PICTURE, columns=len(shown), size=(9, 3.6)) as panels:
        for axes, (name, label) in zip(panels, shown.items(), strict=True):
            for number, (model, title) in enumerate(TITLES.items()):
                found, colour = result["models"][model], f"C{number}"
                far, gain = found["figures"][KL], found["change"][name]
                marker = "o" if model in MERGED else "s"
                axes.plot(far["mean"], gain["mean"], marker, color=colour, label=title.replace("`", ""))
                axes.plot(far["values"], gain["values"], ".", color=colour, markersize=4, alpha=0.6)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xlabel("KL to the SFT model, nats a response")
            axes.set_ylabel(label)
        panels[0].legend(fontsize=6, frameon=False)


if __name__ == "__main__":
    trials.publish(__doc__, RESULT, measure, table, draw)
