"""A part of a recipe that is repeated: `rounds: n` unrolled into stages named <round>.<stage>, as post1.sft, post2.sft.

Inside, `previous_round.<stage>` leads to that stage of the round before; in the first round to what `begins_with` says
of it, and a list goes without it. Outside, `post.<stage>` leads to the last round's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from lightning_llm.pipeline.names import name_nearest
from lightning_llm.settings import UserError
from lightning_llm.stages.config import Edge, GenerateStage, RoundsStage, StageConfig

BEFORE = "previous_round."


def unrolled(stages: Mapping[str, StageConfig]) -> dict[str, StageConfig]:
    """All stages in one mapping, those of each round one after the other.

    Raises:
        UserError: a round before the first is asked for, or a stage that the rounds have not.
    """
    last = {
        f"{name}.{own}": f"{name}{stage.rounds}.{own}"
        for name, stage in stages.items()
        if isinstance(stage, RoundsStage)
        for own in stage.stages
    }
    flat: dict[str, StageConfig] = {}
    for name, stage in stages.items():
        for own, config in unroll_one(name, stage).items() if isinstance(stage, RoundsStage) else [(name, stage)]:
            flat[own] = config.redirected(lambda edge: last.get(edge.source, edge.source))
    return flat


def unroll_one(name: str, group: RoundsStage) -> dict[str, StageConfig]:
    """The stages of all rounds of one repeated part."""
    flat: dict[str, StageConfig] = {}
    for turn in range(group.rounds):
        for own, stage in group.stages.items():

            def target(edge: Edge, turn: int = turn, own: str = own, stage: StageConfig = stage) -> str | None:
                where = f"stages.{name}.stages.{own}.{edge.setting}"
                if not edge.source.startswith(BEFORE):
                    return f"{name}{turn + 1}.{edge.source}" if edge.source in group.stages else edge.source
                wanted = edge.source.removeprefix(BEFORE)
                if wanted not in group.stages:
                    what = f"there is no stage {wanted} in a round"
                    raise UserError(where, what, name_nearest(wanted, list(group.stages)))
                if turn:
                    return f"{name}{turn}.{wanted}"
                first = group.begins_with.get(wanted)
                if first is None and (edge.setting == "starts_from" or _is_alone(stage, edge.setting)):
                    remedy = f"Say what the first round takes: stages.{name}.begins_with={{{wanted}: STAGE}}"
                    raise UserError(where, "leads to the round before, and the first has none", remedy)
                return first

            moved = stage.redirected(target)
            if isinstance(moved, GenerateStage):
                moved = dataclasses.replace(moved, round=moved.round + turn)
            flat[f"{name}{turn + 1}.{own}"] = moved
    return flat


def _is_alone(stage: StageConfig, setting: str) -> bool:
    return sum(edge.setting == setting for edge in stage.edges()) == 1


def unrolled_keys(keys: Iterable[str], stages: Mapping[str, StageConfig]) -> dict[str, str]:
    """Dotted keys of settings as the stages are called once they are unrolled -> as they are typed."""
    found = {}
    for key in keys:
        parts = re.fullmatch(r"stages\.(\w+)\.stages\.(.+)", key)
        group = stages.get(parts[1]) if parts else None
        if parts and isinstance(group, RoundsStage):
            found |= {f"stages.{parts[1]}{turn + 1}.{parts[2]}": key for turn in range(group.rounds)}
        else:
            found[key] = key
    return found


def stages_of_rounds(stages: Mapping[str, StageConfig]) -> dict[str, tuple[str, ...]]:
    """The parts of a recipe that are repeated, and the names of the stages inside."""
    return {name: tuple(group.stages) for name, group in stages.items() if isinstance(group, RoundsStage)}


def typed_key(text: str, rounds: Mapping[str, Sequence[str]]) -> str:
    """What is typed to set something of an unrolled stage: of stages.post2.sft.lr it is stages.post.stages.sft.lr.

    Args:
        text: with any number of such keys in it.
        rounds: of `stages_of_rounds`.
    """
    for name, inside in rounds.items():
        text = re.sub(rf"\bstages\.{name}\d+\.(?=(?:{'|'.join(inside)})\b)", f"stages.{name}.stages.", text)
    return text
