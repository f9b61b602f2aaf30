"""The verb gate: whether a stage has done what another may be built on, by its evaluation. If not, the run stops.

Leaves `gate.json`: what was wanted, what was found, and what is said where a run stops. So what a gate has seen stays
on record either way; the runner obeys it. Llama 3 goes on to the next length of context when short ones are as good as
before and needles are found at all lengths so far (arXiv 2407.21783, section 3.4.2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_llm.settings import UserError
from lightning_llm.stages.config import GateSettings
from lightning_llm.stages.context import StageContext, StageResult

Metrics = Mapping[str, float]
PERPLEXITY, NEEDLE = "perplexity/", "needle/"
GATE = "gate.json"


class GateClosed(UserError):
    """A gate has not let a run pass. What it has found is in the store and in the run's folder."""

    folder: Path | None = None  # of the run


@dataclass(frozen=True)
class Fault:
    """Why a run stops, and the setting that would let it pass, if one would."""

    what: str
    setting: str | None


def run(context: StageContext) -> StageResult:
    """Compare the evaluation in the input `evaluation` with what is wanted, and with the one in `before`.

    Raises:
        UserError: what is asked was not measured.
    """
    settings: GateSettings = context.settings
    after = read_metrics(context.inputs["evaluation"])
    found: dict[str, float] = {}
    faults: list[Fault] = []
    if settings.short_context is not None:
        domain, loss = worst_loss(read_metrics(context.inputs["before"]), after)
        found["gate/short_context"] = loss
        if not loss <= settings.short_context:  # so that what is no number does not pass
            faults.append(_risen(domain, loss, settings.short_context))
    if settings.needle is not None:
        length, share = worst_length(after)
        found["gate/needle"] = share
        if not share >= settings.needle:
            faults.append(_missed(length, share, settings.needle))
    content = {
        "wanted": asdict(settings),
        "found": {name: value if math.isfinite(value) else None for name, value in found.items()},  # JSON has no NaN
        "stops": _said(faults),
    }
    (context.output / GATE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return StageResult(found)


def obey(name: str, artifact: Path) -> None:
    """Go on, or stop a run.

    Args:
        name: of the gate.

    Raises:
        GateClosed: it does not let pass; says by how much, and how to go on all the same.
    """
    stops = json.loads((artifact / GATE).read_text("utf-8")).get("stops")
    if stops:
        raise GateClosed(f"stage {name}", f"does not pass: {stops['what']}", stops["remedy"])


def _said(faults: list[Fault]) -> dict[str, str] | None:
    """What the user is told of all faults together."""
    if not faults:
        return None
    settings = [fault.setting for fault in faults if fault.setting is not None]
    remedy = f"Train longer, or let it pass: {' '.join(settings)}" if settings else ""
    if len(settings) < len(faults):
        remedy = "No threshold lets that pass: train it again with a smaller lr.peak"
    return {"what": ", and ".join(fault.what for fault in faults), "remedy": remedy}


def _risen(domain: str, loss: float, limit: float) -> Fault:
    """A perplexity that is too high, or that nobody can compare."""
    if not math.isfinite(loss):
        return Fault(f"perplexity of {domain} is no finite number", None)
    what = f"perplexity of {domain} is {loss:.2%} above what it was, {limit:.2%} may be"
    return Fault(what, f"gate.short_context={math.ceil(1000 * loss) / 1000}")


def _missed(length: int, share: float, wanted: float) -> Fault:
    """Needles that are found too seldom."""
    if not math.isfinite(share):
        return Fault(f"the share of needles found at {length} tokens is no number", None)
    what = f"needles are found at {length} tokens in {share:.1%} of cases, {wanted:.1%} must be"
    return Fault(what, f"gate.needle={math.floor(1000 * share) / 1000:g}")


def read_metrics(artifact: Path) -> Metrics:
    """The figures of an evaluation."""
    return json.loads((artifact / "metrics.json").read_text("utf-8"))


def worst_loss(before: Metrics, after: Metrics) -> tuple[str, float]:
    """The domain whose perplexity has risen most, or fallen least, and by which share of what it was; first of all one
    whose perplexity is no number, before or after.

    Raises:
        UserError: no domain was measured in both.
    """
    changes = {name: after[name] / before[name] - 1 for name in after if name.startswith(PERPLEXITY) and name in before}
    if not changes:
        raise UserError("evaluation.text", "has no source, and a gate compares perplexities", "Give it one")
    worst = max(changes, key=lambda name: (math.isnan(changes[name]), changes[name]))
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
