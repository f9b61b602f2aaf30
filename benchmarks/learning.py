"""Does the recipe learn? Runs qwen2 up to DPO once per seed and writes each claim with its figures to
results/learning.json.

    python benchmarks/learning.py [--seeds 0 1 2 3 4 5] [--jobs 4] [overrides ...]

A run that the store already holds costs seconds; the figures come from the run folders alone.
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claims
import torch
import trials
from trials import read, spread

from lightning_llm.data.token_store import TokenStore
from lightning_llm.evaluation.perplexity import mean_loss, sample_text
from lightning_llm.models import Transformer
from lightning_llm.models.families import read_config

RESULT = claims.RESULTS / "learning.json"
SEEDS = (0, 1, 2, 3, 4, 5)
STAGES = ("pretrain", "long_context", "sft", "dpo")
Metrics = Mapping[str, Mapping[str, float]]  # stage -> metric -> value; stage "start" is the untrained model


@dataclass(frozen=True)
class Claim:
    """A sentence, the figure of a run that decides it, and the bound that each seed has to keep, or their mean."""

    says: str
    value: Callable[[Metrics], float]
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    in_the_mean: bool = False  # the mean over the seeds less two of its standard errors, for a figure that is noisy

    @property
    def bounds(self) -> dict[str, float]:
        named = {name: getattr(self, name) for name in ("above", "at_least", "at_most", "below")}
        return {name: bound for name, bound in named.items() if bound is not None}

    def holds(self, values: list[float]) -> bool:
        if self.in_the_mean and len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
            values = [statistics.fmean(values) - 2 * error]
        return all(claims.keeps(value, self.bounds) for value in values)


def domains(metrics: Metrics) -> list[str]:
    return sorted(name for name in metrics["pretrain"] if name.startswith("perplexity/"))


def worst_ratio(metrics: Metrics, later: str, earlier: str) -> float:
    """The largest ratio of perplexities over the domains."""
    return max(metrics[later][name] / metrics[earlier][name] for name in domains(metrics))


CLAIMS = [
    Claim(
        "Before any chat training, exact match on held-out tasks is under .05",
        lambda m: max(m[stage]["tasks/exact_match"] for stage in ("pretrain", "long_context")),
        below=0.05,
    ),
    Claim("After SFT it is over .5", lambda m: m["sft"]["tasks/exact_match"], above=0.5),
    Claim(
        "After DPO, preference accuracy on held-out pairs is over .8",
        lambda m: m["dpo"]["preference/accuracy"],
        above=0.8,
    ),
    Claim(
        "DPO's model beats SFT's: the 95 % interval of its win rate lies above .5",
        lambda m: m["dpo"]["judge/win_rate_low"],
        above=0.5,
    ),
    Claim(
        "DPO lowers exact match by at most .03 (the change)",
        lambda m: m["dpo"]["tasks/exact_match"] - m["sft"]["tasks/exact_match"],
        at_least=-0.03,
    ),
    Claim(
        "Pre-training lowers perplexity at the first context in every domain (worst ratio to the untrained model)",
        lambda m: worst_ratio(m, "pretrain", "start"),
        below=1.0,
    ),
    Claim(
        "Long-context training raises it by at most 2 % (worst ratio to pre-training)",
        lambda m: worst_ratio(m, "long_context", "pretrain"),
        at_most=1.02,
    ),
    Claim(
        "Long-context training has at least 20 % of the pre-training tokens",
        lambda m: m["long_context"]["tokens"] / (m["pretrain"]["tokens"] + m["long_context"]["tokens"]),
        at_least=0.2,
    ),
    Claim(
        "SFT at most doubles it (worst ratio to long-context training)",
        lambda m: worst_ratio(m, "sft", "long_context"),
        at_most=2.0,
    ),
    Claim(
        "The long-context model predicts late tokens better with the full context than with a short one (gain in nats)",
        lambda m: m["long_context"]["late_loss/gain"],
        above=0.0,
    ),
    Claim(
        "It does so in the mean of the seeds less two standard errors over them",
        lambda m: m["long_context"]["late_loss/gain"],
        above=0.0,
        in_the_mean=True,
    ),
]


def measure(arguments: Namespace) -> trials.Result:
    """The result."""
    calls = [("recipe=qwen2", f"seed={seed}", f"until={STAGES[-1]}", *arguments.overrides) for seed in arguments.seeds]
    runs = trials.side_by_side(trials.run, calls, arguments.jobs)
    found = summarise([read_metrics(run) | {"start": untrained_perplexities(run)} for run in runs])
    scale = read(runs[0] / "run.json")["scale"]
    return {"recipe": "qwen2", "scale": scale, "trained_at": trained_at(runs), **found}


def read_metrics(run: Path) -> dict[str, dict[str, float]]:
    """Metrics of each stage of a run."""
    record = read(run / "run.json")
    metrics: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        artifact = read(run / "artifacts" / stage / "stage.json")
        metrics[stage] = {**record["stages"][stage]["metrics"], "tokens": artifact["settings"]["tokens"]}
    return metrics


def trained_at(runs: list[Path]) -> dict[str, list[str]]:
    """The commits that made each stage's artifacts: those that a store holds already are older than this run."""
    commits: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for run in runs:
        for stage, found in commits.items():
            made = read(run / "artifacts" / stage / "stage.json")["git"]
            found.add((made.get("commit") or "unknown") + (" and changes" if made.get("dirty") else ""))
    return {stage: sorted(found) for stage, found in commits.items()}


def untrained_perplexities(run: Path) -> dict[str, float]:
    """What the first stage's evaluation would say of the random weights that it starts from."""
    first, artifact = run / "artifacts" / "pretrain", read(run / "artifacts" / "pretrain.evaluate" / "stage.json")
    model = Transformer(read_config(first / "model"))
    model.reset_parameters(read(first / "stage.json")["settings"]["seed"])
    context, tokens = artifact["settings"]["context"], artifact["settings"]["evaluation"]["text_tokens"]
    found = {}
    with torch.inference_mode():
        for folder in sorted((run / "artifacts/evaluation.prepare/sources/text").iterdir()):
            documents = sample_text(TokenStore.open(folder / "validation"), tokens)
            found[f"perplexity/{folder.name}"] = math.exp(mean_loss(model, documents, context, 4096).compute())
    return found


def summarise(per_seed: list[Metrics]) -> dict[str, Any]:
    """All metrics with their spread, and every claim with the value of each seed: whether it holds on each, or in the
    mean."""
    stages = {}
    for stage in ("start", *STAGES):
        names = set.intersection(*(set(metrics[stage]) for metrics in per_seed))  # no win rate where nobody ever wins
        stages[stage] = {name: spread([metrics[stage][name] for metrics in per_seed]) for name in sorted(names)}
    judged = []
    for claim in CLAIMS:
        values = [claim.value(metrics) for metrics in per_seed]
        judged.append({"claim": claim.says, **claim.bounds, **spread(values), "holds": claim.holds(values)})
    return {"claims": judged, "stages": stages}


if __name__ == "__main__":
    trials.publish(__doc__, RESULT, measure, seeds=SEEDS)
