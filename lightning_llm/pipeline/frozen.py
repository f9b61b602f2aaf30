"""What it costs to run models that do not learn: to evaluate, to sample, to judge. Figures as a plan has them."""

from __future__ import annotations

from typing import Any

from lightning_llm.data.teacher import TeacherFormat
from lightning_llm.merging.config import BLOCK
from lightning_llm.models.config import ModelConfig
from lightning_llm.models.size import ScoreHead, forward_flops_per_token, parameter_counts
from lightning_llm.objectives.config import ObjectiveConfig, RewardModelConfig
from lightning_llm.pipeline.expand import Node
from lightning_llm.pipeline.order import trained_behind
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.stages.config import (
    EvaluateRewardsSettings,
    EvaluateSettings,
    GenerateSettings,
    GenerateStage,
    JudgeStage,
    MergeStage,
    ScoreSettings,
    TeacherSettings,
    TrainSettings,
)

GIB = 2**30
DISK_BYTES_PER_SECOND = 5e8  # read or written
BYTES_PER_SAMPLED_TOKEN = 24  # its text, its id and its log-probability as JSON


def evaluate_figures(recipe: Recipe, node: Node, models: dict[str, ModelConfig]) -> dict[str, Any]:
    """Text, answers and pairs, through the model and through the one that it started from."""
    settings: EvaluateSettings = node.settings
    sizes, parts = settings.evaluation, recipe.evaluation
    model = models[node.inputs["model"]]
    both = 2 if "starts_from" in node.inputs else 1
    phase = recipe.scale.phases.get("preference")
    pair = (phase and phase.tokens_per_example) or settings.context
    # late tokens once more, each quarter of a short context at the end of a whole one (evaluation/perplexity.py)
    passes = 1 + (2 if settings.full_context > settings.context else 0)
    text = sizes.text_tokens * len(parts.text.sources) + passes * sizes.long_documents * settings.full_context
    # greedy once, and sampled once from either model where there are two
    answers = sizes.questions * sizes.max_new_tokens * (1 if both == 1 else 3) if parts.tasks.sources else 0
    pairs = sizes.preference_pairs * pair * both if parts.pairs.sources else 0
    needle = sizes.needle
    lengths = [settings.full_context >> halvings for halvings in range(needle.lengths)]
    tokens = round(text + answers + pairs + needle.trials * needle.depths * sum(lengths))
    return {
        "starts_from": node.inputs["model"],
        "tokens": tokens,
        "context": settings.full_context,
        "flops": tokens * forward_flops_per_token(model, settings.context),
        **held_frozen(model, both),
    }


def evaluate_rewards_figures(node: Node, trained: TrainSettings, tokens_per_example: float | None) -> dict[str, Any]:
    """As many held-out comparisons as are asked for, once through the reward model.

    Args:
        trained: what it was trained by, or the first of those that were merged.
    """
    settings: EvaluateRewardsSettings = node.settings
    head, length = head_of(trained.objective), round(tokens_per_example or settings.context)
    tokens = settings.comparisons * length
    return {
        "starts_from": node.inputs["model"],
        "tokens": tokens,
        "context": settings.context,
        "flops": tokens * forward_flops_per_token(trained.model, length, head),
        **held_frozen(trained.model, head=head),
    }


def head_of(objective: ObjectiveConfig) -> ScoreHead | None:
    """The head of what an objective trains; None: the vocabulary's."""
    if not objective.is_scored:
        return None
    return ScoreHead(len(objective.graded) if isinstance(objective, RewardModelConfig) else 0)


def generate_figures(recipe: Recipe, node: Node, models: dict[str, ModelConfig]) -> dict[str, Any]:
    """As many prompts as are asked for, each computed once for a model, and all responses as long as they may be."""
    settings: GenerateSettings = node.settings
    stage = recipe.stages[node.name]
    assert isinstance(stage, GenerateStage)
    prompt = round(stage.data.tokens_per_example or 0)
    members = [source for role, source in node.inputs.items() if role.startswith("model.")]
    shapes = [models.get(member, recipe.model) for member in members]
    responses = settings.prompts * settings.per_prompt * settings.max_new_tokens
    each = settings.prompts * prompt + responses
    length = prompt + settings.max_new_tokens
    largest = max(shapes, key=lambda shape: parameter_counts(shape)["total"])
    cache = 2 * largest.num_hidden_layers * largest.num_key_value_heads * largest.head_size  # keys and values, fp32
    held = held_frozen(largest)
    return {
        "starts_from": ", ".join(settings.models),
        "tokens": each * len(members),
        "context": length,
        "flops": sum(each * forward_flops_per_token(shape, length) for shape in shapes),
        **held,
        "memory_gib": held["memory_gib"] + 4 * cache * max(recipe.compute.micro_batch_tokens, length) / GIB,
        "disk_gib": BYTES_PER_SAMPLED_TOKEN * responses * len(members) / GIB,
    }


def merge_figures(recipe: Recipe, node: Node, nodes: dict[str, Node], models: dict[str, ModelConfig]) -> dict[str, Any]:
    """Every model read, some more than once, and one written; in memory one tensor, and blocks of each model."""
    stage = recipe.stages[node.name]
    assert isinstance(stage, MergeStage)
    shape, behind = models[node.name], trained_behind(node.name, recipe.stages)
    head = head_of(nodes[behind].settings.objective) if behind is not None else None
    held, total = held_frozen(shape, head=head), parameter_counts(shape, head)["total"]
    read = len(node.inputs) * (1 + stage.method.passes)
    largest = max(shape.vocab_size, shape.intermediate_size) * shape.hidden_size
    return {
        "starts_from": ", ".join(stage.models),
        **held,
        "memory_gib": 4 * (largest + 4 * len(node.inputs) * min(BLOCK, largest)) / GIB,
        "disk_gib": 4 * total / GIB,
        "seconds": 4 * total * (read + 1) / DISK_BYTES_PER_SECOND,
    }


def judge_figures(recipe: Recipe, node: Node, nodes: dict[str, Node], models: dict[str, ModelConfig]) -> dict[str, Any]:
    """All responses, as long as they may be, through every reward model; other judges cost next to nothing."""
    stage = recipe.stages[node.name]
    assert isinstance(stage, JudgeStage)
    found: dict[str, Any] = {"starts_from": ", ".join(stage.data)}
    if not stage.judged_by:
        return found
    shapes = [models.get(name, recipe.model) for name in stage.judged_by]
    sampled = [generate_figures(recipe, nodes[name], models) for name in stage.data]
    tokens, length = sum(figures["tokens"] for figures in sampled), max(figures["context"] for figures in sampled)
    largest = max(shapes, key=lambda shape: parameter_counts(shape)["total"])
    head = ScoreHead()
    flops = tokens * sum(forward_flops_per_token(shape, length, head) for shape in shapes)
    held = held_frozen(largest, len(shapes), head)
    return {**found, "tokens": tokens, "context": length, "flops": flops, **held}


def score_bytes(settings: ScoreSettings, model: ModelConfig) -> int:
    """On disk, of a token that a frozen model has scored."""
    if not isinstance(settings, TeacherSettings):
        return 4
    return TeacherFormat.of(min(settings.k, model.vocab_size), settings.stored_as, model.vocab_size).bytes_per_token


def held_frozen(model: ModelConfig, models: int = 1, head: ScoreHead | None = None) -> dict[str, Any]:
    """Parameters of a model, and the memory of so many of its size, whose weights are all that is kept."""
    total = parameter_counts(model, head)["total"]
    return {"parameters": total, "memory_gib": 4 * total * models / GIB}
