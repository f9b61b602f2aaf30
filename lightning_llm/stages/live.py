"""What a training stage learns from where its data are its own policy's responses, judged while it trains."""

from __future__ import annotations

from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.models import Transformer
from lightning_llm.stages.config import TrainSettings
from lightning_llm.stages.context import StageContext
from lightning_llm.stages.judge import build_judge, judging_cost
from lightning_llm.training.actor import Actor
from lightning_llm.training.rollout import Rollouts

RECORDS = "experience"  # folder of the artifact


def build_rollouts(context: StageContext, policy: Transformer, tokenizer: Tokenizer) -> Rollouts:
    """The live source of a stage. Its reference begins as the policy is now.

    Raises:
        UserError: no prompt can be asked, a reward model has another tokenizer, or the judge lacks what it needs.
    """
    settings: TrainSettings = context.settings
    compute = context.compute
    assert settings.rollout is not None
    if line := settings.draws_otherwise:
        context.console.note(line)
    actor = Actor(
        policy,
        None if settings.judge is None else build_judge(context, [context.inputs["data"]]),
        tokenizer,
        settings.rollout,
        context=max(int(entry["value"]) for entry in settings.context),
        max_tokens=compute.micro_batch_tokens,
        precision=settings.precision,
        seed=settings.seed,
    )
    return Rollouts(
        context.inputs["data"],
        settings.data,
        actor,
        as_pairs="pairs" in settings.objective.forms,
        batch_ramp=settings.batch_tokens,
        total_tokens=settings.tokens,
        seed=settings.seed,
        records=context.output / RECORDS,
        judging_cost=judging_cost(context),
    )
