"""Lengths in examples are planned in tokens before any row is read: by how much, and where that is an estimate."""

from __future__ import annotations

from collections.abc import Collection

from lightning_llm.data.places import is_of_stage
from lightning_llm.pipeline.config import PhaseScale
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.pipeline.rounds import typed_key
from lightning_llm.stages.config import StageConfig, TrainStage


def planned_rows(stage: StageConfig | None) -> float | None:
    """Rows that a stage is to learn from, epochs included; None where its length is not given in examples."""
    if not isinstance(stage, TrainStage) or stage.examples is None:
        return None
    return stage.examples * stage.epochs


def estimated_lengths(recipe: Recipe, names: Collection[str]) -> tuple[str, ...]:
    """A line for each stage of a scaled recipe that counts the user's own rows by what the scale's own rows cost.

    `tokens_per_example` of a scale is the mean of the scale's data. Other rows may be ten times as long, and a stage of
    so many tokens then learns from a tenth of the examples that were asked for.

    Args:
        names: stages to speak of.
    """
    assert recipe.is_scaled, "estimated_lengths(scaled(recipe), ...)"
    lines = []
    for name, stage in recipe.stages.items():
        if name not in names or not isinstance(stage, TrainStage) or stage.rollout is not None:
            continue
        key = f"stages.{name}.data.tokens_per_example"
        cost = stage.data.tokens_per_example
        scales_own = recipe.scale.phases.get(stage.phase, PhaseScale()).tokens_per_example
        own = [
            n
            for n, s in stage.data.sources.items()
            if (n not in recipe.scale.corpora or s.path != recipe.scale.corpora[n].path) and not is_of_stage(s.path)
        ]
        if stage.examples is not None and own and cost == scales_own and not recipe.is_pinned(key):
            lines.append(
                f"{name}: {stage.examples:,.0f} examples are taken for {cost:g} tokens each, as those of scale "
                f"{recipe.scale.name} are; the run measures {' and '.join(own)}, and {key}=... corrects it"
            )
    return tuple(typed_key(line, recipe.rounds) for line in lines)
