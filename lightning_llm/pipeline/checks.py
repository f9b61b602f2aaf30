"""What a tree of known keys may still have wrong: names, ranges, and what does not go together."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from lightning_llm.data.config import SHORTEST_CONTEXT, DataConfig, SourceConfig
from lightning_llm.data.embedded.options import check_embedded, refuse_columns
from lightning_llm.data.places import is_prepared, source_options, split_path
from lightning_llm.data.rows import FORMS
from lightning_llm.models.config import check_scaling
from lightning_llm.pipeline.judged import (
    ASKED,
    check_generation,
    check_judging,
    check_selected_rows,
    check_selection,
)
from lightning_llm.pipeline.live import check_live
from lightning_llm.pipeline.mappings import PHASES
from lightning_llm.pipeline.names import name_nearest, unknown_entry
from lightning_llm.pipeline.order import before_gates, order_of_stages, trained_behind
from lightning_llm.pipeline.remade import check_mask_learning, check_pruning, check_upcycling
from lightning_llm.pipeline.values import each_once, in_range, one_of, whole
from lightning_llm.schedules import as_ramp
from lightning_llm.settings import UserError
from lightning_llm.stages.config import (
    INSERTED,
    ComputeConfig,
    GenerateStage,
    JudgeStage,
    MergeStage,
    PruneStage,
    RoundsStage,
    SelectStage,
    StageConfig,
    TrainStage,
    UpcycleStage,
)

if TYPE_CHECKING:
    from lightning_llm.pipeline.recipe import Recipe

MOST_TOKENS = 2**31  # of a context or a batch: kernels count a batch's tokens in 32 bits
ATTENTION = ("auto", "sdpa", "varlen", "flex", "flash")  # compute.attention
LENGTHS = ("tokens", "examples", "steps")
WARMUPS = ("warmup_tokens", "warmup_steps", "warmup_share")


def check(recipe: Recipe) -> None:
    """Refuse what cannot run, before anything does.

    Raises:
        UserError: names the key.
    """
    if not recipe.stages:
        raise UserError(f"recipe {recipe.name}", "has no stages", "Add one: +stage@stages.NAME=pretrain")
    order_of_stages(recipe.stages)  # before what follows edges: they lead somewhere, and in no circle
    for name, stage in recipe.stages.items():
        _check_stage(f"stages.{name}", stage, recipe.stages)
    _check_what_is_kept(recipe.stages)
    for name, stage in recipe.stages.items():
        if isinstance(stage, TrainStage) and stage.gate.is_on:
            _check_gate(name, stage, recipe)
    for part in ("text", "tasks", "pairs"):
        _check_data(f"evaluation.{part}", getattr(recipe.evaluation, part))
    check_selected_rows(recipe.stages)
    _check_heads(recipe)
    check_compute(recipe.compute)
    in_range("limits.hours", recipe.limits.hours, low=0)
    in_range("seed", recipe.seed, low=0, below=2**63)
    known = _known_corpora(recipe)
    for name, source in recipe.scale.corpora.items():
        if name not in known:
            raise UserError(f"scale.corpora.{name}", "is the corpus of no mixture", name_nearest(name, sorted(known)))
        _check_source(f"scale.corpora.{name}", source)
    for name, source in recipe.tokenizer.sources.items():
        _check_source(f"tokenizer.sources.{name}", source)


def check_rounds(stages: Mapping[str, StageConfig]) -> None:
    """Refuse repeated parts that cannot be unrolled; their stages are checked when they are.

    Raises:
        UserError: names the key.
    """
    for name, group in stages.items():
        _check_name(name)
        if not isinstance(group, RoundsStage):
            continue
        if not group.stages:
            raise UserError(f"stages.{name}.stages", "is empty", f"Add one: +stage@stages.{name}.stages.NAME=sft")
        for own, stage in group.stages.items():
            _check_name(own, f"stages.{name}.stages.{own}")
            if isinstance(stage, RoundsStage):
                raise UserError(f"stages.{name}.stages.{own}", "is made of rounds, inside rounds", "Put it outside")
        for own in group.by_round:
            if own not in group.stages:
                what = f"there is no stage {own} in a round"
                raise UserError(f"stages.{name}.by_round.{own}", what, name_nearest(own, list(group.stages)))
        for own in group.begins_with:
            if own not in group.stages:
                what = f"there is no stage {own} in a round"
                raise UserError(f"stages.{name}.begins_with.{own}", what, name_nearest(own, list(group.stages)))


def check_compute(compute: ComputeConfig) -> None:
    """Refuse devices, precisions and kernels that are none.

    Raises:
        UserError: names the key.
    """
    one_of("compute.precision", compute.precision, ("fp32", "bf16"))
    one_of("compute.strategy", compute.strategy, ("single", "ddp"))
    one_of("compute.accelerator", compute.accelerator, ("cpu", "gpu"))
    one_of("compute.attention", compute.attention, ATTENTION)
    one_of("compute.activation_checkpointing", compute.activation_checkpointing, ("none", "full"))
    in_range("compute.devices", compute.devices, low=1)
    if compute.devices > 1 and compute.strategy == "single":
        raise UserError("compute.devices", f"is {compute.devices} with strategy single", "Set compute.strategy=ddp")
    in_range("compute.micro_batch_tokens", compute.micro_batch_tokens, low=1)
    for name in ("flops_per_second", "efficiency", "generation_efficiency", "memory_gib"):
        in_range(f"compute.{name}", getattr(compute, name), above=0)


def _check_name(name: str, key: str | None = None) -> None:
    if not name.replace("_", "").isalnum() or name in INSERTED:
        taken = f"{', '.join(INSERTED[:-1])} and {INSERTED[-1]}"
        raise UserError(
            key or f"stages.{name}", "is no name for a stage", f"Use letters, digits and _; {taken} are taken"
        )


def _check_stage(key: str, stage: StageConfig, stages: Mapping[str, StageConfig]) -> None:
    if isinstance(stage, TrainStage):
        _check_training(key, stage)
    elif isinstance(stage, GenerateStage):
        check_generation(key, stage)
        _check_data(f"{key}.data", stage.data)
    elif isinstance(stage, JudgeStage):
        check_judging(key, stage)
    elif isinstance(stage, SelectStage):
        check_selection(key, stage, stages)
    elif isinstance(stage, MergeStage):
        _check_merging(key, stage)
    elif isinstance(stage, PruneStage):
        one_of(f"{key}.kind", stage.kind, ("prune",))
        whole(f"{key}.context", stage.context, low=SHORTEST_CONTEXT, below=MOST_TOKENS)
        check_pruning(key, stage, stages)
        _check_data(f"{key}.data", stage.data)
    elif isinstance(stage, UpcycleStage):
        one_of(f"{key}.kind", stage.kind, ("upcycle",))
        check_upcycling(key, stage)


def _check_merging(key: str, stage: MergeStage) -> None:
    one_of(f"{key}.kind", stage.kind, ("merge",))
    if not stage.models:
        raise UserError(f"{key}.models", "names nobody", "Name stages, as [sft, dpo]")
    each_once(f"{key}.models", stage.models, "Take one away")
    if stage.starts_from in stage.models:
        what = "is one of the models: it has learnt nothing since itself"
        raise UserError(f"{key}.starts_from", what, "Name what all of them started from")
    if stage.method.needs_start and stage.starts_from is None:
        what = f"has no value, and {stage.method.name} merges what models have learnt since they began as one"
        raise UserError(f"{key}.starts_from", what, "Name what all of them started from")
    try:
        stage.method.refuse(len(stage.models))
    except ValueError as error:
        what, *remedies = error.args
        remedy = remedies[0] if remedies else f"Choose another method: merge@{key}.method=..."
        raise UserError(f"{key}.models", what, remedy) from error


def _check_heads(recipe: Recipe) -> None:
    """Refuse to sample from a reward model, to judge by one that speaks, to begin with or to merge the wrong one."""
    trained = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, TrainStage)}
    behind = {name: trained_behind(name, recipe.stages) for name in recipe.stages}
    scores = {name: trained[other].objective.is_scored for name, other in behind.items() if other is not None}
    for name, stage in recipe.stages.items():
        if isinstance(stage, MergeStage) and stage.method.needs_scores:
            scores[name] = True
    for name, stage in recipe.stages.items():
        for edge in stage.edges():
            if edge.source not in scores:
                continue
            wanted = edge.setting == "judged_by" or (isinstance(stage, MergeStage) and scores.get(name, False))
            # a reward model begins as either, but what is merged has one head
            may = edge.setting == "starts_from" and scores.get(name) and isinstance(stage, TrainStage)
            if scores[edge.source] != wanted and not may:
                kind = "a reward model" if scores[edge.source] else "a language model"
                known = [other for other, is_scored in scores.items() if is_scored == wanted and other != name]
                remedy = name_nearest(edge.source, known) if known else "Add one: +stage@stages.NAME=reward_model"
                raise UserError(f"stages.{name}.{edge.setting}", f"{edge.source} is {kind}", remedy)


def _check_training(key: str, stage: TrainStage) -> None:
    one_of(f"{key}.kind", stage.kind, ("train",))
    one_of(f"{key}.phase", stage.phase, PHASES)
    given = [unit for unit in LENGTHS if getattr(stage, unit) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        remedy = "Set the others to null" if given else f"Give one, as {key}.tokens=1e6"
        raise UserError(key, f"wants exactly one of {', '.join(LENGTHS)}, has {found}", remedy)
    for name in (*given, "epochs"):
        in_range(f"{key}.{name}", getattr(stage, name), above=0)
    for name in ("context", "batch_tokens") if stage.rollout is None else ("context",):
        if name == "context" and stage.context is None and stage.starts_from is not None:
            continue  # as where it starts from
        if getattr(stage, name) is None:
            raise UserError(f"{key}.{name}", "has no value", f"Give {key}.{name}=...")
        try:
            ramp = as_ramp(getattr(stage, name))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{key}.{name}", str(error), "Give a number or [{at: 0, value: ...}, ...]") from error
        for entry in ramp:
            whole(f"{key}.{name}", entry["value"], low=SHORTEST_CONTEXT if name == "context" else 1, below=MOST_TOKENS)
        if (
            name == "context"
            and len(ramp) > 1
            and stage.data.on_long == "truncate_left"
            and stage.objective.needs_reference
        ):
            raise UserError(
                f"{key}.context",
                "is a ramp, and data.on_long truncates: the reference would see other prompts than the policy",
                f"Give one context, or set {key}.data.on_long=drop",
            )
    warmups = [unit for unit in WARMUPS if getattr(stage.lr, unit) is not None]
    if len(warmups) > 1:
        raise UserError(f"{key}.lr", f"wants at most one of {', '.join(WARMUPS)}", "Set the others to null")
    for unit in warmups:
        in_range(f"{key}.lr.{unit}", getattr(stage.lr, unit), low=0)
    if stage.lr.warmup_share is not None and stage.lr.warmup_share > 1:
        raise UserError(f"{key}.lr.warmup_share", f"is {stage.lr.warmup_share:g}", "It is a share: at most 1")
    for rate in ("peak", "final", "final_share"):
        if (value := getattr(stage.lr, rate)) is not None:
            in_range(f"{key}.lr.{rate}", value, low=0)
    if stage.rope_theta is not None:
        in_range(f"{key}.rope_theta", stage.rope_theta, above=0)
    if stage.evaluate_every is not None:
        in_range(f"{key}.evaluate_every", stage.evaluate_every, above=0)
    if stage.rope_scaling:
        try:
            check_scaling(stage.rope_scaling)
        except ValueError as error:
            remedy = "Give {rope_type: linear, factor: ...} or another, with all that it needs"
            raise UserError(f"{key}.rope_scaling", str(error), remedy) from error
    objective = stage.objective
    check_live(key, stage)
    check_mask_learning(key, stage)
    forms = objective.forms if stage.rollout is None else ASKED
    if stage.data.form not in forms:
        raise UserError(
            f"{key}.data",
            f"{stage.data.name} holds {stage.data.form}, and {objective.name} does not learn from that",
            f"Give it {' or '.join(forms)}",
        )
    if stage.optimizer.online_merging.is_on:
        _check_online_merging(f"{key}.optimizer.online_merging", stage)
    if objective.needs_reference and stage.starts_from is None:
        raise UserError(f"{key}.starts_from", f"has no value, and {objective.name} needs a reference", "Name a stage")
    _check_teacher(key, stage)
    if stage.model is not None and stage.starts_from is not None:
        what = f"is given, and the stage starts from {stage.starts_from}, which has a shape"
        raise UserError(f"{key}.model", what, "Take one of the two away")
    _check_data(f"{key}.data", stage.data)


def _check_teacher(key: str, stage: TrainStage) -> None:
    objective = stage.objective
    if objective.needs_teacher and stage.learns_from is None:
        what = f"has no value, and {objective.name} needs a teacher"
        raise UserError(f"{key}.learns_from", what, "Name a stage, an artifact or a Hugging Face directory")
    if stage.learns_from is not None and not objective.needs_teacher:
        what = f"is given, and {objective.name} knows no teacher"
        raise UserError(f"{key}.learns_from", what, f"Choose objective@{key}.objective=distillation, or take it away")
    if stage.learns_from is not None and stage.learns_from == stage.starts_from:
        what = f"is {stage.learns_from}, which the stage starts from: it expects nothing else yet"
        raise UserError(f"{key}.learns_from", what, "Name another model")
    if objective.needs_teacher and len(as_ramp(stage.context)) > 1 and stage.data.on_long == "truncate_left":
        what = "is a ramp, and data.on_long truncates: the teacher would see other prompts than the student"
        raise UserError(f"{key}.context", what, f"Give one context, or set {key}.data.on_long=drop")


def _check_what_is_kept(stages: Mapping[str, StageConfig]) -> None:
    """Refuse to go on with the context or the learning rate of a model of which no stage of the recipe knows it."""
    for name, stage in stages.items():
        if not isinstance(stage, TrainStage) or trained_behind(stage.starts_from or "", stages) is not None:
            continue
        what = f"has no value, and no stage has trained {stage.starts_from or 'random weights'}"
        if stage.context is None:
            raise UserError(f"stages.{name}.context", what, "Give it a number of tokens")
        if stage.lr.peak is None:
            raise UserError(f"stages.{name}.lr.peak", what, "Give it a learning rate")


def _check_gate(name: str, stage: TrainStage, recipe: Recipe) -> None:
    """Refuse a gate that has no evaluation to look at, of the stage or of the model that it compares with."""
    key = f"stages.{name}"
    if not stage.evaluate or stage.objective.is_scored:
        what = "is given, and a gate asks what a language model is found to have learnt"
        raise UserError(f"{key}.gate", what, f"Set {key}.evaluate=true" if not stage.evaluate else "Take it away")
    if not recipe.evaluation.text.sources:
        raise UserError("evaluation.text", f"has no source, and {key}.gate asks about text", "Give it one")
    if stage.gate.short_context is None:
        return
    before = before_gates(name, recipe.stages)
    if not getattr(recipe.stages.get(before or ""), "evaluate", False):
        what = f"is given, and nothing is known of the model before it ({before or 'random weights'})"
        raise UserError(f"{key}.gate.short_context", what, "Let it start from a stage that is evaluated")


def _check_online_merging(key: str, stage: TrainStage) -> None:
    merging = stage.optimizer.online_merging
    if merging.base is None:
        what = f"has no value, and {merging.method} needs the model that the reference was trained from"
        raise UserError(f"{key}.base", what, "Name a stage, as pretrain")
    if stage.starts_from is None:
        what = f"is {merging.method}, and the stage starts from random weights"
        raise UserError(f"{key}.method", what, "Give the stage a starts_from, or set it to none")
    if merging.base == (merging.reference or stage.starts_from):
        raise UserError(f"{key}.base", "is the reference itself: it has learnt nothing since", "Name an earlier stage")
    if stage.objective.is_scored:
        what = f"is {merging.method}, and a reward model's head is new: no base has one"
        raise UserError(f"{key}.method", what, "Set it to none")


def _check_data(key: str, data: DataConfig) -> None:
    one_of(f"{key}.form", data.form, (*FORMS, "rankings"))
    one_of(f"{key}.on_error", data.on_error, ("stop", "skip"))
    one_of(f"{key}.on_long", data.on_long, ("drop", "truncate_left", "stop"))
    in_range(f"{key}.validation", data.validation, low=0, below=1)
    in_range(f"{key}.max_epochs", data.max_epochs, above=0)
    for name, source in data.sources.items():
        _check_source(f"{key}.sources.{name}", source)


def _known_corpora(recipe: Recipe) -> set[str]:
    """What a corpus may be called: as a source of this recipe, or of a scale of ours (which serve all recipes)."""
    own = [getattr(stage, "data", None) for stage in recipe.stages.values()]
    mixtures = [data for data in own if isinstance(data, DataConfig)]
    mixtures += [getattr(recipe.evaluation, part) for part in ("text", "tasks", "pairs")]
    return {name for data in mixtures for name in data.sources} | _corpora_of_our_scales()


@functools.cache
def _corpora_of_our_scales() -> frozenset[str]:
    from lightning_llm.pipeline.composition import CONF

    files = (OmegaConf.to_container(OmegaConf.load(path)) for path in sorted(CONF.glob("scale/*.yaml")))
    return frozenset(name for file in files if isinstance(file, dict) for name in file.get("corpora", {}))


def _check_source(key: str, source: SourceConfig) -> None:
    if source.path is not None:
        known = source_options(source.path, key)
        for name in source.options:
            if name not in known:
                raise unknown_entry(f"{key}.options.{name}", known, source.path)
        refuse_columns(source.path, source.columns, key)
        kind, name = split_path(source.path, key)
        if kind == "embedded":
            check_embedded(name, source.options, key)
        for name in ("columns", "max_rows"):
            if getattr(source, name) and is_prepared(source.path):
                what = f"is given, and {source.path} holds tokens, no rows any more"
                raise UserError(f"{key}.{name}", what, "Take it away, or name the rows that the tokens were made of")
    try:
        ramp = as_ramp(source.weight)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{key}.weight", str(error), "Give a number or [{at: 0, value: ...}, ...]") from error
    for entry in ramp:
        in_range(f"{key}.weight", entry["value"], low=0)
