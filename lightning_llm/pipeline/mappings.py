"""The keys that settings take where they are no dataclass: of rope_parameters, columns, a scale's shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lightning_llm.data.rows import ROW_FIELDS
from lightning_llm.evaluation.config import NeedleConfig
from lightning_llm.models.config import ROPE_KEYS, ModelConfig

STRETCH = sorted({"rope_type"}.union(*(needed + optional for needed, optional in ROPE_KEYS.values())))
ROLES = ("policy", "teacher")  # of scale.shapes: of a stage's own model if others learn from it, teacher
PHASES = ("pretrain", "masks", "lengthen", "anneal", "sft", "selected", "preference", "reward", "online", "rlhf")
NEEDLE = tuple(f.name for f in dataclasses.fields(NeedleConfig))
CLOSED = {
    "scale.evaluation.needle": NEEDLE,
    "model.rope_parameters": ("rope_theta", *STRETCH),
    "scale.shapes": ROLES,
    "scale.phases": PHASES,
}


def known_entries(path: str) -> Sequence[str] | None:
    """The keys that the mapping at a dotted path may have; None where nothing is known of them beforehand."""
    if path.startswith("scale.shapes."):
        return [f.name for f in dataclasses.fields(ModelConfig)]
    if path.startswith("stages.") and path.endswith(".model.rope_parameters"):
        return CLOSED["model.rope_parameters"]
    if path == "rope_scaling" or path.endswith(".rope_scaling"):
        return STRETCH
    return CLOSED.get(path, ROW_FIELDS if path.endswith(".columns") else None)


def is_open(path: str) -> bool:
    """Whether the mapping at a dotted path may get keys that it does not have yet."""
    return path not in ("scale.shapes", "scale.phases") and (
        known_entries(path) is not None or path.endswith(".options")
    )
