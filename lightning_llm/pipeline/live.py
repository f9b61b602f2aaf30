"""Stages that learn from what their own policy says: what they may not have wrong, and what the sampling costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_llm.models.config import ModelConfig
from lightning_llm.models.size import ScoreHead, forward_flops_per_token, parameter_counts
from lightning_llm.objectives.config import DistillationConfig
from lightning_llm.pipeline.judged import check_judge
from lightning_llm.schedules import as_ramp
from lightning_llm.settings import UserError
from lightning_llm.stages.config import TrainStage

if TYPE_CHECKING:
    from lightning_llm.pipeline.expand import Node

BYTES_PER_RECORDED_TOKEN = 24  # its id, three log-probabilities, its text


def check_live(key: str, stage: TrainStage) -> None:
    """Refuse a live stage without what it needs, and one that is not live with what only those have.

    Raises:
        UserError: names the key.
    """
    objective, learns = stage.objective, "learns from what the policy samples meanwhile"
    is_taught = objective.needs_teacher  # nobody judges: the teacher says what should have come in each token's place
    if stage.rollout is None:
        if objective.needs_samples:
            what = f"{objective.name} {learns}, and the stage has no rollout"
            raise UserError(f"{key}.objective", what, f"Begin the stage with stage@{key}=rlhf")
        if stage.judge is not None or stage.judged_by:
            setting = "judged_by" if stage.judge is None else "judge"
            what = "is given, and nothing is judged: the stage has no rollout"
            raise UserError(f"{key}.{setting}", what, f"Take it away, or begin with stage@{key}=online_dpo")
        return
    if not learns_live(stage):
        what = f"{objective.name} does not learn from responses of the policy"
        if is_taught:
            raise UserError(f"{key}.objective.targets", what, "Set it to full: nothing is kept of what is not said yet")
        raise UserError(f"{key}.objective", what, "Choose dpo, ipo, mdpo, rloo, ppo, grpo or dapo")
    if not is_taught and stage.rollout.per_prompt < 2:
        what = f"is at least 2, as responses to a prompt are compared, is {stage.rollout.per_prompt}"
        raise UserError(f"{key}.rollout.per_prompt", what, f"Give {key}.rollout.per_prompt=2 or more")
    if isinstance(objective, DistillationConfig) and objective.teacher_weight != 1:
        what = f"is {objective.teacher_weight:g}, and the rest would be the student's own responses as labels"
        raise UserError(f"{key}.objective.teacher_weight", what, "Set it to 1")
    if stage.judge is None and not is_taught:
        what = f"has no value, and {key} {learns}"
        raise UserError(f"{key}.judge", what, f"Choose one: +judge@{key}.judge=exact_answer")
    if stage.judge is not None:
        check_judge(key, stage.judge, stage.judged_by)
    elif stage.judged_by:
        raise UserError(f"{key}.judged_by", "is given, and nothing is judged", f"Take it away: {key}.judged_by=[]")
    if stage.starts_from is None:
        raise UserError(f"{key}.starts_from", "has no value: random weights have nothing to say", "Name a stage")
    if stage.batch_tokens is not None:
        what = "is given, and a step of this stage is counted in prompts"
        raise UserError(f"{key}.batch_tokens", what, f"Give {key}.rollout.prompts instead")
    if stage.context is not None and len(as_ramp(stage.context)) > 1:
        raise UserError(f"{key}.context", "is a ramp, and responses have one limit", "Give a number")
    for name, source in stage.data.sources.items():
        if not isinstance(source.weight, int | float):
            raise UserError(f"{key}.data.sources.{name}.weight", "is a ramp", "Give a number: prompts have no order")


def learns_live(stage: TrainStage) -> bool:
    """Whether the objective can learn from responses: from all of them, from the best against the worst, or from what a
    teacher expects in their tokens' places."""
    objective = stage.objective
    is_asked = isinstance(objective, DistillationConfig) and not objective.is_kept
    return objective.needs_samples or "pairs" in objective.forms or is_asked


def live_figures(
    stage: TrainStage, node: Node, model: ModelConfig, models: dict[str, ModelConfig], length: int
) -> dict[str, Any]:
    """What drawing and judging add to a stage's training, and the share of its tokens that it learns from.

    A stage's nominal tokens are its prompts with all that is said to them. They are drawn once for all passes, then
    scored by policy, reference and reward models.

    Args:
        models: shapes of the recipe's stages.
        length: tokens of a prompt with a response.

    Returns:
        learnt: share of the nominal tokens that go through training.
        sampled_flops: of drawing, a token at a time.
        scored_flops: of scoring what was drawn.
        memory_bytes, disk_bytes: of frozen models, and of records.
    """
    rollout = stage.rollout
    assert rollout is not None
    drawn = node.settings.tokens / rollout.epochs
    judges = [models.get(source, model) for role, source in node.inputs.items() if role.startswith("reward_model.")]
    own = forward_flops_per_token(model, length)
    judging = sum(forward_flops_per_token(shape, length, ScoreHead()) for shape in judges)
    return {
        "learnt": min(2 / rollout.per_prompt, 1.0) if "pairs" in stage.objective.forms else 1.0,
        "sampled_flops": drawn * own,
        "scored_flops": drawn * (2 * own + judging),
        "memory_bytes": 4 * sum(parameter_counts(shape)["total"] for shape in (model, *judges)),
        "disk_bytes": BYTES_PER_RECORDED_TOKEN * drawn,
    }
