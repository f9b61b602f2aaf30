"""The verb gate: whether a stage has done what another may be built on, by its evaluation. If not, the run stops.

Leaves `gate.json`, what was wanted and what was found. Llama 3 goes on to the next length of context when short ones
are as good as before and needles are found at all lengths so far (arXiv 2407.21783, section 3.4.2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from lightning_llm.settings import UserError
from lightning_llm.stages.config import GateSettings
from lightning_llm.stages.context import StageContext, StageResult

Metrics = Mapping[str, float]
PERPLEXITY, NEEDLE = "perplexity/", "needle/"


def run(context: StageContext) -> StageResult:
    """Compare the evaluation in the input `evaluation` with what is wanted, and with the one in `before`.

    Raises:
        UserError: it does not pass; says by how much, and how to go on all the same.
    """
    settings: GateSettings = context.settings
    after = read_metrics(context.inputs["evaluation"])
    metrics: dict[str, float] = {}
    faults, remedies = [], []
    if settings.short_context is not None:
        domain, loss = worst_loss(read_metrics(context.inputs["before"]), after)
        metrics["gate/short_context"] = loss
        if loss > settings.short_context:
            faults.append(
                f"perplexity of {domain} is {loss:.2%} above what it was, {settings.short_context:.2%} may be"
            )
            remedies.append(f"gate.short_context={math.ceil(1000 * loss) / 1000:g}")
    if settings.needle is not None:
        length, share = worst_length(after)
        metrics["gate/needle"] = share
        if share < settings.needle:
            faults.append(
                f"needles are found at {length} tokens in {share:.0%} of cases, {settings.needle:.0%} must be"
            )
            remedies.append(f"gate.needle={math.floor(100 * share) / 100:g}")
    content = {"wanted": {"short_context": settings.short_context, "needle": settings.needle}, "found": metrics}
    (context.output / "gate.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    if faults:
        raise UserError(
            f"stage {context.name}",
            f"does not pass: {', and '.join(faults)}",
            f"Train longer, or let it pass: {' '.join(remedies)}",
        )
    return StageResult(metrics)


def read_metrics(artifact: Path) -> Metrics:
    """The figures of an evaluation."""
    return json.loads((artifact / "metrics.json").read_text("utf-8"))


def worst_loss(before: Metrics, after: Metrics) -> tuple[str, float]:
    """The domain whose perplexity has risen most, or fallen least, and by which share of what it was.

    Raises:
        UserError: no domain was measured in both.
    """
    changes = {name: after[name] / before[name] - 1 for name in after if name.startswith(PERPLEXITY) and name in before}
    if not changes:
        raise UserError("evaluation.text", "has no source, and a gate compares perplexities", "Give it one")
    worst = max(changes, key=lambda name: changes[name])
    return worst.removeprefix(PERPLEXITY), changes[worst]


def worst_length(metrics: Metrics) -> tuple[int, float]:
    """The length at which needles are found least often, the shortest of several; and the share that is found.

    Raises:
        UserError: none was hidden.
    """
    shares = {int(name.removeprefix(NEEDLE)): share for name, share in metrics.items() if name.startswith(NEEDLE)}
    if not shares:
        what = "has no text that is long enough to hide a needle in, and a gate asks for one"
        raise UserError("evaluation.text", what, "Give it longer documents")
    return min(sorted(shares.items()), key=lambda entry: entry[1])
