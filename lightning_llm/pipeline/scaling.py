"""A recipe at another scale: shapes, lengths, batches and learning rates mapped, ratios kept. One pure function."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from lightning_llm.data.config import SHORTEST_CONTEXT, STAGE, DataConfig, SourceConfig, TokenizerConfig
from lightning_llm.data.embedded.options import refuse_columns
from lightning_llm.data.places import is_of_stage
from lightning_llm.models.config import ModelConfig
from lightning_llm.optimization.config import LearningRateConfig
from lightning_llm.pipeline.config import PhaseScale, ScaleConfig
from lightning_llm.pipeline.names import name_nearest
from lightning_llm.pipeline.order import ancestors, order_of_stages, trained_behind
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.pipeline.remade import with_sizes
from lightning_llm.schedules import BatchPlan, Ramp, as_ramp, ramp_value
from lightning_llm.settings import UserError
from lightning_llm.stages.config import GateConfig, GenerateStage, PruneStage, SelectStage, StageConfig, TrainStage

EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
Config = TypeVar("Config")


def scaled(recipe: Recipe, scale: ScaleConfig | None = None) -> Recipe:
    """The recipe at `scale`; at its own where none is given. What the user has set stays as it is.

    Kept: the family's features, the shares of tokens among pre-training stages (but for `minimum_share`), the ratio of
    every context to the recipe's first, the ratio of every batch to the first of its phase, the shape of learning
    rates with their ratio of final to peak, the ratio of peaks (but for `minimum_peak_share`), and the recipe's own
    sources where it names them.

    Raises:
        UserError: a source that the scale has no corpus for, a length that nothing is known of.
    """
    if recipe.is_scaled:
        return recipe
    scale = scale or recipe.scale
    order = order_of_stages(recipe.stages)
    trained = {name: stage for name in order if isinstance(stage := recipe.stages[name], TrainStage)}
    original = {name: _Published(recipe, scale, name, stage) for name, stage in trained.items()}
    stages: dict[str, StageConfig] = {}
    for name in order:
        stages[name] = _scaled_stage(recipe, scale, name, original, stages)
    evaluation = _overlaid(recipe, "evaluation", recipe.evaluation, _given(replace(scale.evaluation, needle={})))
    needle = _overlaid(recipe, "evaluation.needle", evaluation.needle, scale.evaluation.needle)
    evaluation = replace(evaluation, needle=needle)
    for part in ("text", "tasks", "pairs"):
        data = _located(recipe, scale, f"evaluation.{part}", getattr(evaluation, part))
        evaluation = replace(evaluation, **{part: data})
    contexts = [as_ramp(stage.context) for stage in stages.values() if isinstance(stage, TrainStage)]
    factor = _context_factor(scale, original)
    model, tokenizer = _scaled_model(recipe, scale, contexts, factor)
    stages = {name: _with_scaled_model(recipe, scale, name, stage, model, factor) for name, stage in stages.items()}
    for name, stage in stages.items():
        if isinstance(stage, TrainStage) and stage.model is not None:
            _refuse_small_vocabulary(f"stages.{name}.model", stage.model, tokenizer)
    stages = with_sizes(recipe, scale, stages, model)
    return replace(
        recipe,
        scale=scale,
        model=model,
        tokenizer=tokenizer,
        stages=stages,
        evaluation=evaluation,
        is_scaled=True,
    )


class _Published:
    """A stage's figures as the recipe states them, also where the user has set others."""

    def __init__(self, recipe: Recipe, scale: ScaleConfig, name: str, stage: TrainStage):
        def figure(key: str, value: Any) -> Any:
            return recipe.published.get(f"stages.{name}.{key}", value)

        self.phase = stage.phase
        self.context: Ramp = as_ramp(figure("context", stage.context))  # of None where it is kept from before
        batch = figure("batch_tokens", stage.batch_tokens)
        if stage.rollout is not None:
            cost = stage.data.tokens_per_example or scale.phases.get(stage.phase, PhaseScale()).tokens_per_example
            batch = figure("rollout.prompts", stage.rollout.prompts) * (cost or 1)
        self.batch: Ramp = as_ramp(batch)
        self.tokens: float | None = figure("tokens", stage.tokens)
        self.peak: float | None = figure("lr.peak", stage.lr.peak)  # none: that of the stage before
        peak = f"stages.{name}.lr.peak"  # of a stage that the user has added it may be the scale's size, not a report's
        self.states_peak = self.peak is not None and (peak in recipe.published or not recipe.is_pinned(peak))
        steps = figure("steps", stage.steps)
        if self.tokens is None and steps is not None:
            self.tokens = tokens_of_steps(steps, self.batch)


def tokens_of_steps(steps: float, batch_ramp: Ramp) -> float:
    """Tokens of so many optimizer steps."""
    horizon = batch_ramp[-1]["at"] + steps * max(entry["value"] for entry in batch_ramp)
    return BatchPlan(batch_ramp, int(horizon)).boundary(int(steps))


# ---- a stage ----


def _scaled_stage(
    recipe: Recipe, scale: ScaleConfig, name: str, original: dict[str, _Published], before: Mapping[str, StageConfig]
) -> StageConfig:
    stage = recipe.stages[name]
    if isinstance(stage, TrainStage):
        return _scaled_training(recipe, scale, name, stage, original, before)
    if isinstance(stage, PruneStage):
        return _scaled_pruning(recipe, scale, name, stage, original)
    return _scaled_generation(recipe, scale, name, stage) if isinstance(stage, GenerateStage) else stage


def _scaled_pruning(
    recipe: Recipe, scale: ScaleConfig, name: str, stage: PruneStage, original: dict[str, _Published]
) -> PruneStage:
    """On texts that are there and as long as the scale's; its sizes follow when the model is known."""
    key = f"stages.{name}"
    if not stage.method.needs_data:
        return replace(stage, data=DataConfig(name="none"))
    context = max(round(stage.context * _context_factor(scale, original)), SHORTEST_CONTEXT)
    stage = _overlaid(recipe, key, stage, {"context": context})
    return replace(stage, data=_located(recipe, scale, f"{key}.data", stage.data))


def _scaled_generation(recipe: Recipe, scale: ScaleConfig, name: str, stage: GenerateStage) -> GenerateStage:
    """As many prompts and samples, and as long ones, as the scale can afford."""
    key, data = f"stages.{name}", _located(recipe, scale, f"stages.{name}.data", stage.data)
    if data.tokens_per_example is None:
        data = replace(data, tokens_per_example=scale.generation.tokens_per_prompt)
    sizes = _given(replace(scale.generation, tokens_per_prompt=None))
    sizes["per_prompt"] = min(stage.per_prompt, sizes.get("per_prompt", stage.per_prompt))
    return _overlaid(recipe, key, replace(stage, data=data), sizes)


def _scaled_training(
    recipe: Recipe,
    scale: ScaleConfig,
    name: str,
    stage: TrainStage,
    original: dict[str, _Published],
    made: Mapping[str, StageConfig],
) -> TrainStage:
    own, key = original[name], f"stages.{name}"
    phase = scale.phases.get(stage.phase, PhaseScale())

    def free(field: str) -> bool:
        return not recipe.is_pinned(f"{key}.{field}")

    data = _located(recipe, scale, f"{key}.data", stage.data)
    if data.tokens_per_example is None:
        data = replace(data, tokens_per_example=phase.tokens_per_example)
    stage = _scaled_rollout(recipe, scale, key, replace(stage, data=data))
    batch, factor = as_ramp(stage.batch_tokens), _context_factor(scale, original)
    is_kept = stage.context is None
    context = _context_before(stage, made) if is_kept else as_ramp(stage.context)
    if stage.rope_scaling and free("rope_scaling.original_max_position_embeddings"):
        stage = replace(stage, rope_scaling=_shortened(stage.rope_scaling, factor))
    if free("context") and scale.context is not None and not is_kept:
        context = _times(context, factor)
    if free("batch_tokens") and phase.batch_tokens is not None and stage.rollout is None:
        first = next(other for other in original.values() if other.phase == own.phase)
        batch = _times(batch, phase.batch_tokens / first.batch[0]["value"])

    has_free_length = all(free(unit) for unit in ("tokens", "examples", "steps"))
    if has_free_length:
        stage = _budgeted(stage, scale, phase, own, original)
        if phase.examples is not None and (rows := rows_of_stages(stage.data, made)) is not None:
            stage = replace(stage, examples=min(phase.examples, max(rows, 1.0)))
    tokens = length_in_tokens(key, stage, batch)
    # positions in ramps, warm-ups and intervals are in the recipe's tokens
    stretch = 1.0 if own.tokens is None else tokens / own.tokens
    if free("context"):
        context = _stretched(context, stretch, scale.minimum_steps, batch)
    if free("batch_tokens"):
        batch = _stretched(batch, stretch, scale.minimum_steps, batch)
    if has_free_length:
        floor = max(_end_of_floor(ramp, scale.minimum_steps, batch) for ramp in (context, batch))
        if tokens < floor:
            stage, tokens = _lengthened(stage, floor / tokens), floor
    if stage.gate.is_on:
        stage = replace(stage, gate=_scaled_gate(recipe, f"{key}.gate", stage.gate, phase.gate))
    if free("evaluate_every") and stage.evaluate_every is not None:
        stage = replace(stage, evaluate_every=stage.evaluate_every * stretch)
    peaks = (other.peak for other in original.values() if other.phase == own.phase and other.states_peak)
    highest = max(filter(None, peaks), default=0.0)
    lr = _scaled_learning_rate(recipe, f"{key}.lr", stage, scale, own, tokens, batch, highest)
    return replace(stage, context=_plain(context), batch_tokens=_plain(batch), lr=lr)


def _scaled_rollout(recipe: Recipe, scale: ScaleConfig, key: str, stage: TrainStage) -> TrainStage:
    """A stage whose policy answers prompts: so many for a step as the scale can afford, and as long.

    Its step in tokens is nominal: the prompts times what one of them costs with all that is said to it.

    Raises:
        UserError: nobody says what that is.
    """
    if stage.rollout is None:
        return stage
    prompts = scale.phases.get(stage.phase, PhaseScale()).prompts
    sizes = {"prompts": prompts, "max_new_tokens": scale.generation.max_new_tokens}
    given = {name: value for name, value in sizes.items() if value is not None}
    rollout = _overlaid(recipe, f"{key}.rollout", stage.rollout, given)
    cost = example_cost(key, stage)
    return replace(stage, rollout=rollout, batch_tokens=max(round(rollout.prompts * cost), 1))


def _budgeted(
    stage: TrainStage, scale: ScaleConfig, phase: PhaseScale, own: _Published, original: dict[str, _Published]
) -> TrainStage:
    """The stage with the length that the scale's budget gives it."""
    if phase.examples is not None:
        return replace(stage, tokens=None, steps=None, examples=phase.examples)
    if phase.tokens is not None and own.tokens is not None:
        first = next(other for other in original.values() if other.phase == own.phase)
        return replace(stage, tokens=phase.tokens * own.tokens / (first.tokens or own.tokens), steps=None)
    if stage.phase != "pretrain" or scale.pretraining_tokens is None or own.tokens is None:
        return stage
    together = [other for other in original.values() if other.phase == "pretrain" and other.tokens is not None]
    total = sum(other.tokens for other in together if other.tokens is not None)
    shares = [max((other.tokens or 0) / total, scale.minimum_share) for other in together[1:]]
    share = 1 - sum(shares) if own is together[0] else shares[together.index(own) - 1]
    if share <= 0:
        raise UserError(
            "scale.minimum_share",
            f"{scale.minimum_share:g} for each of {len(shares)} stages leaves the first pre-training stage nothing",
            "Lower it",
        )
    return replace(stage, tokens=share * scale.pretraining_tokens, steps=None)


def _scaled_gate(recipe: Recipe, key: str, gate: GateConfig, own: GateConfig) -> GateConfig:
    """As wide as the scale's models need it, in what the recipe asks of them."""
    asked = {name: value for name, value in _given(own).items() if getattr(gate, name) is not None}
    return _overlaid(recipe, key, gate, asked)


def rows_of_stages(data: DataConfig, stages: Mapping[str, StageConfig]) -> float | None:
    """Examples after which a mixture has seen the rows that other stages make for it once; None if it has no such rows.

    They are not known before they are made: every prompt is taken to leave as many as are kept at most.
    """
    shares = {name: as_ramp(source.weight)[0]["value"] for name, source in data.sources.items()}
    passes = []
    for name, source in data.sources.items():
        if source.path and is_of_stage(source.path) and shares[name]:
            rows = rows_left(source.path.removeprefix(STAGE), stages)
            passes.append(rows * sum(shares.values()) / shares[name])
    return max(passes, default=None)


def rows_left(name: str, stages: Mapping[str, StageConfig]) -> float:
    """Rows that a stage leaves at most: prompts of one that generates; what another keeps of what it is made from."""
    stage = stages[name]
    if isinstance(stage, GenerateStage):
        return stage.prompts
    rows = sum(rows_left(edge.source, stages) for edge in stage.edges() if edge.setting == "data")
    return rows * stage.per_prompt * stage.keep if isinstance(stage, SelectStage) else rows


def length_in_tokens(key: str, stage: TrainStage, batch: Ramp) -> float:
    """Tokens of a stage whose length may be given in examples or in steps.

    Raises:
        UserError: nobody says what an example costs.
    """
    if stage.tokens is not None:
        return stage.tokens
    if stage.steps is not None:
        return tokens_of_steps(stage.steps, batch)
    assert stage.examples is not None
    return stage.examples * stage.passes * example_cost(key, stage)


def example_cost(key: str, stage: TrainStage) -> float:
    """Tokens of an example on average; of a prompt with all that is said to it.

    Raises:
        UserError: nobody says.
    """
    if stage.data.tokens_per_example is None:
        raise UserError(
            f"{key}.data.tokens_per_example",
            "has no value, so examples cannot be counted in tokens",
            f"Give it, or give {key}.tokens" if stage.rollout is None else "Give it",
        )
    return stage.data.tokens_per_example


def _lengthened(stage: TrainStage, factor: float) -> TrainStage:
    unit = next(unit for unit in ("tokens", "examples", "steps") if getattr(stage, unit) is not None)
    return replace(stage, **{unit: math.ceil(getattr(stage, unit) * factor)})


def _scaled_learning_rate(
    recipe: Recipe,
    key: str,
    stage: TrainStage,
    scale: ScaleConfig,
    own: _Published,
    tokens: float,
    batch: Ramp,
    highest_peak: float,
) -> LearningRateConfig:
    lr, phase = stage.lr, scale.phases.get(stage.phase, PhaseScale())
    free = {f.name for f in fields(lr) if not recipe.is_pinned(f"{key}.{f.name}")}
    raised = max(1.0, scale.minimum_peak_share * highest_peak / own.peak) if "peak" in free and own.peak else 1.0
    changes: dict[str, Any] = {}
    if "peak" in free and lr.peak is not None:
        changes["peak"] = lr.peak * phase.lr_factor * raised
    if "final" in free and lr.final is not None:
        changes["final"] = lr.final * phase.lr_factor * raised
    if not free.issuperset(("warmup_tokens", "warmup_steps", "warmup_share")):
        return replace(lr, **changes)
    stretch = 1.0 if own.tokens is None else tokens / own.tokens
    floor = min(scale.minimum_warmup_steps * batch[0]["value"], tokens / 2)
    if not any((lr.warmup_share, lr.warmup_tokens, lr.warmup_steps)):
        return replace(lr, **changes)  # a stage without one gets none
    if lr.warmup_share is not None:
        changes["warmup_share"] = max(lr.warmup_share, floor / tokens)
    elif lr.warmup_tokens is not None:
        changes["warmup_tokens"] = max(lr.warmup_tokens * stretch, floor)
    elif lr.warmup_steps is not None and (stretch != 1.0 or floor):
        warmup = tokens_of_steps(lr.warmup_steps, own.batch) * stretch
        changes |= {"warmup_steps": None, "warmup_tokens": max(warmup, floor)}
    return replace(lr, **changes)


# ---- ramps ----


def _times(ramp: Ramp, factor: float) -> Ramp:
    return [{"at": entry["at"], "value": max(round(entry["value"] * factor), 1)} for entry in ramp]


def _stretched(ramp: Ramp, stretch: float, minimum_steps: int, batch: Ramp) -> Ramp:
    """Move a ramp's positions, and keep them so far apart that every segment has its optimizer steps."""
    moved: Ramp = ramp[:1]
    for before, entry in itertools.pairwise(ramp):
        floor = moved[-1]["at"] + minimum_steps * ramp_value(batch, before["at"])
        moved.append({"at": max(round(entry["at"] * stretch), floor), "value": entry["value"]})
    return moved


def _end_of_floor(ramp: Ramp, minimum_steps: int, batch: Ramp) -> float:
    """The fewest tokens that leave the last segment its optimizer steps."""
    return ramp[-1]["at"] + minimum_steps * ramp_value(batch, ramp[-1]["at"])


def _context_before(stage: TrainStage, made: Mapping[str, StageConfig]) -> Ramp:
    """The context with which the training behind `starts_from` ended, at this scale."""
    before = made[trained_behind(stage.starts_from or "", made) or ""]
    assert isinstance(before, TrainStage), "checked"
    return [{"at": 0, "value": as_ramp(before.context)[-1]["value"]}]


def _plain(ramp: Ramp) -> Any:
    """A ramp of one entry is a number again."""
    return ramp[0]["value"] if len(ramp) == 1 else ramp


# ---- model, data, evaluation ----


def _context_factor(scale: ScaleConfig, original: dict[str, _Published]) -> float:
    """What the scale multiplies every length of context with, so that the recipe's first becomes its own."""
    if scale.context is None or not original:
        return 1.0
    return scale.context / next(iter(original.values())).context[0]["value"]


def _shortened(rope: dict[str, Any], factor: float) -> dict[str, Any]:
    """RoPE stretched by as much as before, from a length that is `factor` times its own."""
    lengths = {key: max(round(value * factor), 1) for key, value in rope.items() if key.startswith("original_max")}
    return rope | lengths


def _of_shape(recipe: Recipe, key: str, published: ModelConfig, shape: dict[str, Any], factor: float) -> ModelConfig:
    """The published model with a scale's shape, and with what of the family's features is a length of context or goes
    with a width."""
    if not published.num_experts:
        shape = {name: value for name, value in shape.items() if name not in EXPERT_FIELDS}
    model = _overlaid(recipe, key, published, shape)
    changes: dict[str, Any] = {}
    if model.sliding_window is not None and not recipe.is_pinned(f"{key}.sliding_window"):
        changes["sliding_window"] = max(round(model.sliding_window * factor), 1)
    if not recipe.is_pinned(f"{key}.rope_parameters.original_max_position_embeddings"):
        changes["rope_parameters"] = _shortened(model.rope_parameters, factor)
    if model.query_pre_attn_scalar is not None and not recipe.is_pinned(f"{key}.query_pre_attn_scalar"):
        narrower = model.head_size / published.head_size
        changes["query_pre_attn_scalar"] = max(round(model.query_pre_attn_scalar * narrower), 1)
    return replace(model, **changes)


def _with_scaled_model(
    recipe: Recipe, scale: ScaleConfig, name: str, stage: StageConfig, main: ModelConfig, factor: float
) -> StageConfig:
    """A stage with a model of its own: that of its role's shape, with the vocabulary that all stages share."""
    if not isinstance(stage, TrainStage) or stage.model is None:
        return stage
    students = [other for other in recipe.stages.values() if isinstance(other, TrainStage) and other.learns_from]
    teaches = any(name in ancestors(student.learns_from or "", recipe.stages) for student in students)
    shape = dict(scale.shapes.get("teacher" if teaches else "policy", {}))
    if "max_position_embeddings" in shape or scale.context is not None:
        shape["max_position_embeddings"] = main.max_position_embeddings
    shape |= {"vocab_size": main.vocab_size, "tokenizer": main.tokenizer}
    return replace(stage, model=_of_shape(recipe, f"stages.{name}.model", stage.model, shape, factor))


def _scaled_model(
    recipe: Recipe, scale: ScaleConfig, contexts: list[Ramp], context_factor: float
) -> tuple[ModelConfig, TokenizerConfig]:
    """The shape of the scale with the family's features, and the tokenizer that goes with it."""
    shape = dict(scale.shapes.get("policy", {}))
    if scale.context is not None and contexts:
        longest = max(entry["value"] for ramp in contexts for entry in ramp)
        shape.setdefault("max_position_embeddings", int(longest))
    if scale.vocabulary is not None:
        shape["tokenizer"] = "train"
    model = _of_shape(recipe, "model", recipe.model, shape, context_factor)
    tokenizer = recipe.tokenizer
    if model.tokenizer != "train":
        return model, tokenizer
    entries = model.vocab_size if scale.vocabulary is None else scale.vocabulary
    tokenizer = _overlaid(recipe, "tokenizer", tokenizer, {"vocab_size": entries})
    model = _overlaid(recipe, "model", model, {"vocab_size": tokenizer.vocab_size})
    _refuse_small_vocabulary("model", model, tokenizer)
    return model, tokenizer


def _refuse_small_vocabulary(key: str, model: ModelConfig, tokenizer: TokenizerConfig) -> None:
    if model.tokenizer == "train" and model.vocab_size < tokenizer.vocab_size:
        what = f"{model.vocab_size:,} rows cannot hold a tokenizer of {tokenizer.vocab_size:,} entries"
        raise UserError(f"{key}.vocab_size", what, "Raise it, or lower tokenizer.vocab_size")


def _located(recipe: Recipe, scale: ScaleConfig, key: str, data: DataConfig) -> DataConfig:
    """The mixture with a place for every source: its own, or the scale's corpus of that name."""
    sources: dict[str, SourceConfig] = {}
    for name, source in data.sources.items():
        if source.path is not None:
            sources[name] = source
            continue
        if name not in scale.corpora:
            known = [corpus for corpus, place in scale.corpora.items() if place.path is not None]
            raise UserError(f"{key}.sources.{name}", f"has no path, and scale {scale.name} has no corpus {name}",
                            f"Give it a path. {name_nearest(name, known)}")  # fmt: skip
        corpus = scale.corpora[name]
        refuse_columns(corpus.path or "", source.columns, f"{key}.sources.{name}")
        if corpus.path is not None:  # a corpus without one is dropped: its share goes to the others
            sources[name] = _overlaid(recipe, f"{key}.sources.{name}", source, _given(replace(corpus, weight=None)))
    if data.sources and not sources:
        raise UserError(key, f"scale {scale.name} drops all of its sources", "Give one of them a path")
    share = {} if scale.validation is None else {"validation": scale.validation}
    return _overlaid(recipe, key, replace(data, sources=sources), share)


def _given(config: Any) -> dict[str, Any]:
    """Fields that say something."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {name: value for name, value in values.items() if value is not None and value != {}}


def _overlaid(recipe: Recipe, key: str, config: Config, values: dict[str, Any]) -> Config:
    """`config` with `values`, but for what the user has set."""
    free = {name: value for name, value in values.items() if not recipe.is_pinned(f"{key}.{name}")}
    try:
        return replace(config, **free)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except ValueError as error:  # a shape of the user's and one of the scale's that do not go together
        raise UserError(key, str(error), "Give all that belong together") from error
