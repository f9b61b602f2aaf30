"""Stages that make another model of one without training it, pruning and upcycling, and the one that learns masks:
what they may not have wrong, their sizes at a scale, the shapes that they leave, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_llm.models.config import SIZES, ModelConfig
from lightning_llm.models.derived import pruned, upcycled
from lightning_llm.models.size import forward_flops_per_token, parameter_counts
from lightning_llm.objectives.config import PruningMasksConfig
from lightning_llm.settings import UserError
from lightning_llm.stages.config import (
    PruneSettings,
    PruneStage,
    StageConfig,
    TrainStage,
    UpcycleSettings,
    UpcycleStage,
)
from lightning_llm.stages.context import model_directory

if TYPE_CHECKING:
    from lightning_llm.pipeline.config import ScaleConfig
    from lightning_llm.pipeline.expand import Node
    from lightning_llm.pipeline.recipe import Recipe

GIB = 2**30
DISK_BYTES_PER_SECOND = 5e8  # read or written
MEASURED = ("text", "conversations")  # forms of rows that activations are measured on
WIDTHS = ("intermediate_size", "hidden_size")
WIDTH_STEP = 8  # widths at another scale are multiples of it, as products like them


# ---- checks ----


def check_pruning(key: str, stage: PruneStage, stages: Mapping[str, StageConfig]) -> None:
    """Refuse a stage that prunes nothing, or by a measure that knows nothing of it.

    Raises:
        UserError: names the key.
    """
    _check_start(key, stage.starts_from, "pruned")
    method, sizes = stage.method, stage.sizes
    if unknown := [name for name in sizes if name not in method.ranks]:
        known = ", ".join(method.ranks)
        what = f"is given, and {method.name} ranks {known} alone"
        raise UserError(f"{key}.{unknown[0]}", what, f"Choose prune@{key}.method=activation, or take it away")
    if method.needs_masks:
        _check_masks_behind(key, stage, stages)
    elif not sizes:
        raise UserError(key, "makes nothing smaller", f"Give {' or '.join(f'{key}.{name}' for name in method.ranks)}")
    if method.needs_data and stage.data.form not in MEASURED:
        what = f"{stage.data.name} holds {stage.data.form}, and activations are measured on texts"
        raise UserError(f"{key}.data", what, f"Give it {' or '.join(MEASURED)}")


def _check_masks_behind(key: str, stage: PruneStage, stages: Mapping[str, StageConfig]) -> None:
    """Masks are those of the stage that it starts from, and of so many units."""
    source = stage.starts_from or ""
    learnt = masks_of(stages.get(source))
    if learnt is None and source in stages:
        what = f"{source} has learnt no masks"
        remedy = f"Name a stage whose objective is pruning_masks, or choose prune@{key}.method=activation"
        raise UserError(f"{key}.starts_from", what, remedy)
    if learnt is not None and stage.intermediate_size not in (None, learnt.intermediate_size):
        what = f"is {stage.intermediate_size}, and {source} learns masks for {learnt.intermediate_size}"
        raise UserError(f"{key}.intermediate_size", what, "Set it to null")


def check_mask_learning(key: str, stage: TrainStage) -> None:
    """Refuse to learn masks of no model, or for no size.

    Raises:
        UserError: names the key.
    """
    if (objective := masks_of(stage)) is None:
        return
    if objective.intermediate_size < 1:
        raise UserError(f"{key}.objective.intermediate_size", "has no value", "Give the hidden units that are to stay")
    _check_start(key, stage.starts_from, "masked")
    if stage.rollout is not None:
        raise UserError(f"{key}.rollout", "is given, and masks are learnt from text", "Take it away")


def check_upcycling(key: str, stage: UpcycleStage) -> None:
    """Refuse experts that nothing can be cut from.

    Raises:
        UserError: names the key.
    """
    _check_start(key, stage.starts_from, "upcycled")
    for name, known in (("experts", ("slices", "copies")), ("of", ("entries", "units"))):
        if getattr(stage, name) not in known:
            raise UserError(f"{key}.{name}", f"{getattr(stage, name)!r} is none", f"Choose {' or '.join(known)}")
    if stage.experts == "copies":
        for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
            if getattr(stage, name) is not None:
                what = f"is {getattr(stage, name)}, and a copy is as wide as the feed-forward"
                raise UserError(f"{key}.{name}", what, f"Set it to null, or choose {key}.experts=slices")


def _check_start(key: str, source: str | None, done: str) -> None:
    if source is None:
        raise UserError(f"{key}.starts_from", f"has no value: there is no model to be {done}", "Name a stage")


def units_of_masks(name: str, stage: PruneStage, stages: Mapping[str, StageConfig]) -> int:
    """The hidden units of a layer that stay where masks decide: what they were learnt for.

    Raises:
        UserError: a model of elsewhere has learnt none, or they were learnt for another number than the stage's.
    """
    source, key = stage.starts_from or "", f"stages.{name}"
    if (learning := masks_of(stages.get(source))) is not None:
        return learning.intermediate_size
    from lightning_llm.models.masked import read_units  # knows torch: only models of elsewhere cost it

    try:
        learnt = read_units(model_directory(Path(source).expanduser()))
    except FileNotFoundError:
        remedy = f"Name a model that has, or choose prune@{key}.method=activation"
        raise UserError(f"{key}.starts_from", f"{source} has learnt no masks", remedy) from None
    asked = stage.intermediate_size
    if learnt is not None and asked not in (None, learnt):
        what = f"is {asked}, and the masks of {source} were learnt for {learnt}"
        raise UserError(f"{key}.intermediate_size", what, "Set it to null")
    if learnt is None and asked is None:
        what = f"has no value, and {source} does not say what its masks were learnt for"
        raise UserError(f"{key}.intermediate_size", what, "Give it")
    units = learnt or asked
    assert units is not None
    return units


def masks_of(stage: StageConfig | None) -> PruningMasksConfig | None:
    """The objective of a stage that learns masks; None of another."""
    objective = stage.objective if isinstance(stage, TrainStage) else None
    return objective if isinstance(objective, PruningMasksConfig) else None


# ---- at another scale ----


def with_sizes(
    recipe: Recipe, scale: ScaleConfig, stages: Mapping[str, StageConfig], model: ModelConfig
) -> dict[str, StageConfig]:
    """Stages that keep as large a share of their model as in the recipe, where the model is the recipe's.

    Args:
        recipe: as it is published.
        stages: at the scale.
        model: the recipe's, at the scale.
    """
    found = dict(stages)
    for name, stage in stages.items():
        own = _own_model(name, recipe, stages, model)
        if own is None:
            continue
        published, there = own
        if isinstance(stage, PruneStage):
            free = {
                field: size for field, size in stage.sizes.items() if not recipe.is_pinned(f"stages.{name}.{field}")
            }
            found[name] = replace(stage, **{f: _share(f, size, published, there) for f, size in free.items()})
        elif isinstance(stage, TrainStage) and (masks := masks_of(stage)) is not None:
            if not recipe.is_pinned(f"stages.{name}.objective.intermediate_size"):
                size = _share("intermediate_size", masks.intermediate_size, published, there)
                found[name] = replace(stage, objective=replace(masks, intermediate_size=size))
        elif isinstance(stage, UpcycleStage):
            found[name] = _with_experts(recipe, scale, name, stage)
    return found


def _with_experts(recipe: Recipe, scale: ScaleConfig, name: str, stage: UpcycleStage) -> UpcycleStage:
    """With the scale's own experts, as a recipe's mixture has them; copies are as wide as their feed-forward."""
    shape = scale.shapes.get("policy", {})
    wanted = ("num_experts", "num_experts_per_tok")
    if stage.experts == "slices":
        wanted += ("moe_intermediate_size", "shared_expert_intermediate_size")
    free = [field for field in wanted if field in shape and not recipe.is_pinned(f"stages.{name}.{field}")]
    return replace(stage, **{field: shape[field] for field in free})


def _own_model(
    name: str, recipe: Recipe, stages: Mapping[str, StageConfig], model: ModelConfig
) -> tuple[dict[str, int], ModelConfig] | None:
    """The sizes of the model of random weights that a stage's line begins with, as published, and this model at the
    scale; None: it is of elsewhere."""
    while True:
        source = getattr(stages[name], "starts_from", None)
        if source is None:
            break
        if source not in stages:
            return None
        name = source
    original, scaled = (getattr(parts[name], "model", None) for parts in (recipe.stages, stages))
    published = recipe.model if original is None else original
    key = "model" if original is None else f"stages.{name}.model"
    sizes = {field: recipe.published.get(f"{key}.{field}", getattr(published, field)) for field in SIZES}
    return sizes, model if scaled is None else scaled


def _share(field: str, size: int, published: Mapping[str, int], scaled: ModelConfig) -> int:
    """As large a share of the scaled model's size as `size` is of the published one's."""
    whole, there = published[field], getattr(scaled, field)
    if whole == there:
        return size
    step = WIDTH_STEP if field in WIDTHS else 1
    return min(max(step * round(size * there / whole / step), 1), there)


# ---- shapes ----


def shape_left(node: Node, parent: ModelConfig) -> ModelConfig:
    """What a node that prunes or upcycles makes of a model.

    Raises:
        UserError: nothing can be made of it.
    """
    settings: PruneSettings | UpcycleSettings = node.settings
    try:
        if isinstance(settings, PruneSettings):
            return pruned(parent, settings.sizes)
        return upcycled(parent, settings.mixture)
    except ValueError as error:
        field, _, what = str(error).partition(" ")
        if vars(settings).get(field) is not None:
            raise UserError(f"stages.{node.name}.{field}", what, "Change it") from error
        remedy = "Name another model"
        raise UserError(f"stages.{node.name}.starts_from", f"{field} of the model {what}", remedy) from error


def refuse_masks_of_another_size(name: str, masks: PruningMasksConfig | None, parent: ModelConfig) -> None:
    """Refuse to learn masks of a mixture, or for more units than there are.

    Raises:
        UserError: names the key.
    """
    if masks is None:
        return
    try:
        pruned(parent, {"intermediate_size": masks.intermediate_size})
    except ValueError as error:
        field, _, what = str(error).partition(" ")
        if field == "intermediate_size":
            raise UserError(f"stages.{name}.objective.{field}", what, "Lower it") from error
        raise UserError(f"stages.{name}.starts_from", f"{field} of the model {what}", "Name a dense model") from error


# ---- figures ----


def remade_figures(node: Node, parent: ModelConfig, child: ModelConfig) -> dict[str, Any]:
    """The parent read, measured if the method does, and the child written, both in memory."""
    settings: PruneSettings | UpcycleSettings = node.settings
    counts, before = parameter_counts(child), parameter_counts(parent)["total"]
    found = {
        "starts_from": node.inputs["starts_from"],
        "parameters": counts["total"],
        "active": counts["active"],
        "memory_gib": 4 * (before + counts["total"]) / GIB,
        "disk_gib": 4 * counts["total"] / GIB,
        "seconds": 4 * (before + counts["total"]) / DISK_BYTES_PER_SECOND,
    }
    if isinstance(settings, PruneSettings) and settings.tokens:
        found |= {"tokens": settings.tokens, "context": settings.context}
        found["flops"] = settings.tokens * forward_flops_per_token(parent, settings.context)
    return found
