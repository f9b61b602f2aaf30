"""Stages that sample, judge and select: what they may not have wrong, before anything is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_llm.data.config import STAGE, DataConfig
from lightning_llm.data.places import is_of_stage
from lightning_llm.evaluation.config import RULES, SCORED, JudgeConfig
from lightning_llm.pipeline.values import each_once, one_of
from lightning_llm.settings import UserError
from lightning_llm.stages.config import GenerateStage, JudgeStage, SelectStage, StageConfig

ASKED = ("questions", "prompts")  # forms of data that a model can answer
READ_AS = {  # what a selection leaves -> forms of data that can read it (data/rows.py)
    "conversations": ("conversations", "prompts"),
    "pairs": ("pairs", "rankings", "prompts", "questions"),
}


def check_judge(key: str, judge: JudgeConfig, judged_by: Sequence[str]) -> None:
    """Refuse a judge that asks a reward model where there is none, and a reward model that no judge asks.

    Args:
        key: of the stage that has both.

    Raises:
        UserError: names the key.
    """
    each_once(f"{key}.judged_by", judged_by, "Take one away")
    if judge.needs_reward_model and not judged_by:
        what = "names nobody, and the judge asks a reward model"
        raise UserError(f"{key}.judged_by", what, "Name a stage, as [reward_model], or choose another judge")
    if judged_by and not judge.needs_reward_model:
        what = f"is given, and {judge.name} asks no reward model"
        remedy = f"Take it away ({key}.judged_by=[]), or choose judge@{key}.judge=reward_model"
        raise UserError(f"{key}.judged_by", what, remedy)


def check_generation(key: str, stage: GenerateStage) -> None:
    """Refuse to sample from nobody, and prompts that are none.

    Raises:
        UserError: names the key.
    """
    one_of(f"{key}.kind", stage.kind, ("generate",))
    if not stage.models:
        raise UserError(f"{key}.models", "names nobody", "Name a stage, or several: [sft, dpo]")
    each_once(f"{key}.models", stage.models, "Raise per_prompt instead")
    one_of(f"{key}.data.form", stage.data.form, ASKED)
    for name, source in stage.data.sources.items():
        if not isinstance(source.weight, int | float):
            raise UserError(f"{key}.data.sources.{name}.weight", "is a ramp", "Give a number: prompts have no order")


def check_judging(key: str, stage: JudgeStage) -> None:
    """Refuse to judge nothing, or with half of what the judge needs.

    Raises:
        UserError: names the key.
    """
    one_of(f"{key}.kind", stage.kind, ("judge",))
    _names_stages(key, stage.data)
    check_judge(key, stage.judge, stage.judged_by)


def check_selection(key: str, stage: SelectStage, stages: Mapping[str, StageConfig]) -> None:
    """Refuse rules that are none, those that go by scores where nobody has judged, and those that go by what a score
    is where it is known up to a constant of the prompt.

    Raises:
        UserError: names the key.
    """
    one_of(f"{key}.kind", stage.kind, ("select",))
    one_of(f"{key}.form", stage.form, ("conversations", "pairs"))
    one_of(f"{key}.rule", stage.rule, ("best", "random") if stage.form == "pairs" else RULES)
    one_of(f"{key}.balance", stage.balance, ("none", "difficulty"))
    _names_stages(key, stage.data)
    _check_scores_are_compared(key, stage, stages)
    if stage.rule == "threshold" and stage.minimum_score is None:
        what = "has no value, and rule=threshold keeps what reaches it"
        raise UserError(f"{key}.minimum_score", what, f"Give {key}.minimum_score=...")
    if stage.balance != "none" and stage.keep == 1:
        raise UserError(f"{key}.keep", "is 1: all rows stay, whatever their difficulty", "Give a share below 1")
    if stage.form == "pairs" and stage.per_prompt > 1:
        raise UserError(f"{key}.per_prompt", "is above 1, and a prompt makes one pair", "Take it away")
    for name in stage.data:
        if not isinstance(stages.get(name), GenerateStage):
            continue
        remedy = f"Name a stage of kind judge in {key}.data"
        if stage.rule in SCORED:
            what = f"is {stage.rule}, and nobody has judged what {name} has sampled"
            raise UserError(f"{key}.rule", what, f"{remedy}, or choose the rule random")
        if stage.balance != "none":
            what = f"is by {stage.balance}, and nobody has judged what {name} has sampled"
            raise UserError(f"{key}.balance", what, f"{remedy}, or set it to none")


def judge_that_only_ranks(stage: SelectStage, stages: Mapping[str, StageConfig]) -> str | None:
    """The first stage behind a selection of whose scores none says that a response is right; None: there is none."""
    judging = ((name, stages.get(name)) for name in stage.data)
    return next((name for name, one in judging if isinstance(one, JudgeStage) and not one.judge.tells_right), None)


def check_selected_rows(stages: Mapping[str, StageConfig]) -> None:
    """Refuse to read rows of a selection that are of another form than the stage learns from.

    Raises:
        UserError: names the key of the source.
    """
    for name, stage in stages.items():
        data = getattr(stage, "data", None)
        if not isinstance(data, DataConfig):
            continue
        for source, config in data.sources.items():
            if not (config.path and is_of_stage(config.path)):
                continue
            made_by = config.path.removeprefix(STAGE)
            selection = stages.get(made_by)
            if isinstance(selection, SelectStage) and data.form not in READ_AS[selection.form]:
                fitting = next((form for form, read in READ_AS.items() if data.form in read), None)
                what = f"{made_by} leaves {selection.form}, and {name} reads {data.form}"
                remedy = f"Set stages.{made_by}.form={fitting}" if fitting else "Name another source"
                raise UserError(f"stages.{name}.data.sources.{source}.path", what, remedy)


def _names_stages(key: str, data: Sequence[str]) -> None:
    if not data:
        raise UserError(f"{key}.data", "names no stage", "Name one, as [sample]")
    each_once(f"{key}.data", data, "Take one away")


def _check_scores_are_compared(key: str, stage: SelectStage, stages: Mapping[str, StageConfig]) -> None:
    name = judge_that_only_ranks(stage, stages)
    if name is None:
        return
    judging = stages[name]
    assert isinstance(judging, JudgeStage)
    why = f"{name} asks a judge ({judging.judge.name}) that only ranks responses"
    if judging.judge.needs_reward_model:
        why = f"{name} asks a reward model, whose scores are known up to a constant of the prompt"
        if stage.rule == "threshold":
            remedy = f"Set {key}.rule=best and {key}.minimum_score=null"
            raise UserError(f"{key}.rule", f"is threshold, and {why}", remedy)
        if stage.minimum_score is not None:
            what = f"is {stage.minimum_score:g}, and {why}"
            raise UserError(f"{key}.minimum_score", what, f"Set {key}.minimum_score=null, or let a verifier judge")
    if stage.balance != "none":
        what = f"is by {stage.balance}, the share of right responses, and {why}"
        remedy = f"Set {key}.balance=none (and {key}.keep=1, or as many are drawn by chance), or let a verifier judge"
        raise UserError(f"{key}.balance", what, remedy)
