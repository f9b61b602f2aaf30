"""The verb train: a model's weights after an objective, on a mixture of data, for a number of tokens."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

from lightning_llm.data.packing import StageData
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.models import ModelConfig, Transformer, set_rope_scaling, set_rope_theta
from lightning_llm.models.compilation import compile_parts
from lightning_llm.models.families import CLASSIFIER, read_head
from lightning_llm.models.kernels import use_attention
from lightning_llm.models.reward import RewardModel
from lightning_llm.models.size import ScoreHead, forward_flops, training_flops
from lightning_llm.objectives.base import Objective
from lightning_llm.objectives.distillation import Distillation
from lightning_llm.optimization.online_merging import OnlineMerging
from lightning_llm.settings import UserError
from lightning_llm.stages.config import TrainSettings
from lightning_llm.stages.context import (
    LAST,
    StageContext,
    StageResult,
    model_directory,
    refuse_other_tokenizer,
    threads,
)
from lightning_llm.stages.live import build_rollouts
from lightning_llm.stages.row_report import LONG
from lightning_llm.training.averaging import WeightAverage, restore
from lightning_llm.training.journal import Journal, held_out_loss
from lightning_llm.training.loggers import stage_loggers
from lightning_llm.training.loop import fit
from lightning_llm.training.phases import Phases
from lightning_llm.training.rollout import Rollouts


def run(context: StageContext) -> StageResult:
    """Train in this process on one device, or in one process for each of several.

    Leaves `model/`, a Hugging Face directory with the tokenizer's files, and `metrics.jsonl`; where `model/` is an
    average of the weights, `last/` is such a directory of the last ones.

    Raises:
        UserError: data, model and tokenizer do not belong together.
        KeyboardInterrupt: SIGINT or SIGTERM came.
    """
    refuse_other_tokenizer(f"stage {context.name}", context.inputs)
    if context.compute.devices > 1:
        from lightning_llm.stages.worker import launch

        return launch(context)
    return train(context)


def train(context: StageContext, rank: int = 0) -> StageResult:
    """What each rank does; rank 0 writes and its result counts."""
    settings: TrainSettings = context.settings
    compute, phases = context.compute, Phases()
    with phases("load"):
        journal, objective, data, tokenizer = prepare_training(context)
    average = WeightAverage(settings.averaging, settings.tokens, data.steps) if settings.averaging else None
    journal.measures_average = average is not None
    callbacks = [journal] if average is None else [average, journal]  # the average is measured once it is in the model
    with (
        threads(compute.threads),
        stage_loggers(context.logged if rank == 0 else None, context.name, settings) as journal.loggers,
    ):
        fit(objective, data, compute, precision=settings.precision, callbacks=callbacks, rank=rank)
    if "loss" not in journal.last:
        raise nothing_learnt(context)
    if rank == 0:
        chat = settings.data.form != "text"
        stop_ids = [tokenizer.end_of_turn_id, tokenizer.eos_id] if chat else [tokenizer.eos_id]
        with phases("save"):
            objective.model.save_pretrained(context.output / "model", eos_token_ids=stop_ids)
            tokenizer.save(context.output / "model")
            if isinstance(data, Rollouts) and data.config.reference == "ema":  # it is state of the stage, too
                data.actor.reference.model.save_pretrained(context.output / "reference", eos_token_ids=stop_ids)
            if average is not None:
                restore(objective.model, average.last)
                objective.model.save_pretrained(context.output / LAST, eos_token_ids=stop_ids)
                tokenizer.save(context.output / LAST)
    rates = {"tokens_per_second": journal.tokens / journal.seconds, "steps": data.steps, "tokens": journal.tokens}
    utilisation = journal.flops / journal.seconds / journal.flops_per_second
    if average is not None:
        rates["averaged/checkpoints"] = average.count
    metrics = journal.last | rates | {"flops_utilisation": utilisation}
    seconds = phases.seconds | {"train": journal.seconds, "validate": journal.validation_seconds}
    if isinstance(data, Rollouts):  # parts of what training and validation took
        seconds |= data.actor.phases.seconds
    return StageResult(metrics, data.ledger(data.steps), journal.flops, seconds)


def prepare_training(context: StageContext) -> tuple[Journal, Objective, StageData | Rollouts, Tokenizer]:
    """All that stands before the first step."""
    settings: TrainSettings = context.settings
    compute = context.compute
    tokenizer = Tokenizer.load(context.inputs["tokenizer"] / "tokenizer")
    if settings.rollout is None:
        data = stored_data(context)
        model = build_model(context)
        batches = functools.partial(
            data.validation, settings.context[-1]["value"], compute.micro_batch_tokens, validation_tokens(settings)
        )
        validate = held_out_loss(batches)
    else:
        model = build_model(context)
        data = build_rollouts(context, model, tokenizer)
        if data.recorded:
            context.console.note(
                f"{data.recorded} drawings of an interrupted run are there: learnt from, not drawn again"
            )
        validate = data.validate
    for source, rows in data.dropped.items():
        if rows:
            listed = context.inputs["data"] / LONG
            where = f" (named in {listed})" if listed.is_file() else ""
            context.console.note(f"{rows} rows of {source} are longer than the context and left out{where}")
    objective = build_objective(context, model, tokenizer)
    if compute.compile:
        compile_parts(objective.model)
    head = objective.model.score_head if isinstance(objective.model, RewardModel) else None
    journal = Journal(
        context.output / "metrics.jsonl",
        data,
        context.console,
        total_tokens=settings.tokens,
        evaluate_every=context.evaluate_every,
        validate=validate,
        training_flops=functools.partial(step_flops, model.config, head, teacher_of(objective)),
        flops_per_second=compute.flops_per_second * compute.devices,
    )
    return journal, objective, data, tokenizer


def teacher_of(objective: Objective) -> ModelConfig | None:
    """The shape of the model that is asked in every step, if one is."""
    teacher = objective.teacher if isinstance(objective, Distillation) else None
    return None if teacher is None else teacher.model.config


def step_flops(
    config: ModelConfig, head: ScoreHead | None, teacher: ModelConfig | None, segments: list[tuple[int, int]]
) -> float:
    """Of training on segments (tokens, tokens of the prefix), and of asking a teacher about them."""
    asked = 0.0 if teacher is None else forward_flops(teacher, segments)
    return training_flops(config, segments, head) + asked


def stored_data(context: StageContext) -> StageData:
    """The prepared rows, by counters; says so where they are not as many as was planned."""
    settings: TrainSettings = context.settings
    data = StageData(
        context.inputs["data"],
        settings.data,
        context_ramp=settings.context,
        batch_ramp=settings.batch_tokens,
        total_tokens=settings.tokens,
        seed=settings.seed,
        token_columns={"reference_logps": context.inputs["reference"]} if "reference" in context.inputs else {},
        teacher=context.inputs.get("teacher"),
    )
    if context.rows is not None and (other := count_of_rows(context.name, settings.tokens, context.rows, data.rows)):
        context.console.note(other)
    return data


def nothing_learnt(context: StageContext) -> UserError:
    """What is said of a stage without any unit of its objective."""
    if context.settings.rollout is not None:
        what = "no prompt has a response that is worth more than another"
        return UserError(f"stage {context.name}", what, "Raise rollout.per_prompt, or choose another judge")
    return UserError(f"stage {context.name}", "nothing in its data is to be learnt", "Give rows with an answer")


def count_of_rows(name: str, tokens: int, planned: float, rows: float) -> str:
    """What is to be said where a stage learns from another number of rows than was asked for; empty within a tenth.

    Args:
        tokens: of the stage, which are settled before any row is read.
        planned: rows that were taken for so many tokens.
        rows: how many they are.
    """
    if 0.9 * planned <= rows <= 1.1 * planned:
        return ""
    return (
        f"{tokens:,} tokens are about {rows:,.0f} rows of {tokens / rows:.0f} tokens, not {planned:,.0f} of "
        f"{tokens / planned:g}; for as many as planned: stages.{name}.data.tokens_per_example={tokens / rows:.0f}"
    )


def build_model(context: StageContext) -> Transformer:
    """Random weights by `draws_by`, or those of `starts_from`; with this stage's RoPE and room for its context."""
    settings: TrainSettings = context.settings
    if "starts_from" in context.inputs:
        directory = model_directory(context.inputs["starts_from"])
        goes_on = settings.objective.is_scored and read_head(directory) == CLASSIFIER
        model = (RewardModel if goes_on else Transformer).from_pretrained(directory)
    else:
        model = Transformer(settings.model)
        model.reset_parameters(settings.draws_by)
    config: ModelConfig = model.config
    if settings.rope_theta is not None:
        config = set_rope_theta(config, settings.rope_theta)
    if settings.rope_scaling:
        config = set_rope_scaling(config, settings.rope_scaling)
    longest = max(int(entry["value"]) for entry in settings.context)
    model.config = replace(config, max_position_embeddings=max(config.max_position_embeddings, longest))
    use_attention(model, context.compute, precision=settings.precision, needs_gradient=True)
    model.activation_checkpointing = context.compute.activation_checkpointing == "full"
    return model


def build_objective(context: StageContext, model: Transformer, tokenizer: Tokenizer) -> Objective:
    """The objective with its optimizer and schedule; where its data know no reference it keeps a copy of `model`."""
    settings: TrainSettings = context.settings
    config = settings.objective
    parts: dict[str, Any] = {"formatting_ids": tokenizer.formatting_ids} if config.needs_reference else {}
    if config.draws:
        parts["seed"] = settings.draws_by
    if "teacher_model" in context.inputs:
        parts["teacher"] = build_teacher(context)
    if config.needs_reference and "reference" not in context.inputs and settings.rollout is None:
        parts["reference"] = copy.deepcopy(model)  # the policy before its first step, asked in each
    objective: Objective = config.build(model, **parts)
    if settings.optimizer.online_merging.is_on:
        objective.online_merging = build_online_merging(context, model)
    return objective.optimised_by(settings.optimizer, settings.lr, settings.tokens)


def build_teacher(context: StageContext) -> Transformer:
    """The model that is asked in every step."""
    teacher = Transformer.from_pretrained(model_directory(context.inputs["teacher_model"]))
    use_attention(teacher, context.compute, precision=context.settings.precision, needs_gradient=False)
    return teacher


def build_online_merging(context: StageContext, model: Transformer) -> OnlineMerging:
    """Around the optimizer: the task vector from the base's directory to the reference's, as parameters of `model`.

    Raises:
        UserError: one of the two is another architecture than the trained model.
    """
    settings: TrainSettings = context.settings
    base, reference = (
        Transformer.from_pretrained(model_directory(context.inputs[f"merging_{role}"])).state_dict()
        for role in ("base", "reference")
    )
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for role, state in (("base", base), ("reference", reference)):
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise UserError(
                f"optimizer.online_merging.{role}",
                f"{context.inputs[f'merging_{role}']} is a model of another shape than the trained one",
                "Name one of the same family and size",
            )
    taus = {name: tensor.sub_(base.pop(name)) for name, tensor in reference.items()}
    return OnlineMerging(settings.optimizer, taus, settings.seed)


def validation_tokens(settings: TrainSettings) -> int:
    """Held-out tokens of each source: together a hundredth of the stage's, so that ten times cost a few per cent."""
    longest = max(int(entry["value"]) for entry in settings.context)
    return min(max(settings.tokens // (100 * len(settings.data.sources)), 4 * longest), 2**18)
