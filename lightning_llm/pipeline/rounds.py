"""A part of a recipe that is repeated: `rounds: n` unrolled into stages named <round>.<stage>, as post1.sft, post2.sft.

Inside, `previous_round.<stage>` leads to that stage of the round before; in the first round to what `begins_with` says
of it, and a list goes without it. Outside, `post.<stage>` leads to the last round's. Settings that differ from round to
round, as the context that is lengthened in steps, stand in `by_round.<stage>.<setting>` as lists. Each round asks
other prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_llm.pipeline.names import name_nearest, refused_by
from lightning_llm.settings import UserError
from lightning_llm.stages.config import Edge, GenerateStage, RoundsStage, StageConfig, TrainStage

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

            moved = in_round(
                stage.redirected(target), group.by_round.get(own, {}), turn, f"stages.{name}.by_round.{own}"
            )
            flat[f"{name}{turn + 1}.{own}"] = _in_turn(moved, turn)
    return flat


def in_round(config: Any, by_round: Any, turn: int, where: str) -> Any:
    """Settings with those values that differ between rounds, as they are in one of them.

    Args:
        by_round: setting -> the list of its values, or a mapping of the same form for settings within settings.
        turn: of the round, from 0.
        where: the key of `by_round`.

    Raises:
        UserError: a setting that there is not, or one without a value for this round.
    """
    if not isinstance(by_round, dict):
        raise UserError(where, "is no mapping of settings", "Give {SETTING: [one value a round, ...]}")
    known = [f.name for f in dataclasses.fields(config)]
    changes: dict[str, Any] = {}
    for setting, values in by_round.items():
        key = f"{where}.{setting}"
        if setting not in known:
            raise UserError(key, "is not a setting of this stage", name_nearest(setting, known))
        before = getattr(config, setting)
        if isinstance(values, list):
            if turn >= len(values):
                raise UserError(key, f"has {len(values)} values, and there are more rounds", "Give one for each round")
            changes[setting] = values[turn]
        elif dataclasses.is_dataclass(before):
            changes[setting] = in_round(before, values, turn, key)
        else:
            raise UserError(key, f"is {values!r}", "Give a list with a value for each round")
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise refused_by(type(config), where, ValueError(f"{error} (in round {turn + 1})")) from error


def _in_turn(stage: StageConfig, turn: int) -> StageConfig:
    """The stage of a later round: one that asks prompts goes on where the round before has ended."""
    if isinstance(stage, GenerateStage):
        return dataclasses.replace(stage, round=stage.round + turn)
    if isinstance(stage, TrainStage) and stage.rollout is not None:
        return dataclasses.replace(stage, rollout=dataclasses.replace(stage.rollout, round=stage.rollout.round + turn))
    return stage


def _is_alone(stage: StageConfig, setting: str) -> bool:
    return sum(edge.setting == setting for edge in stage.edges()) == 1


def unrolled_keys(keys: Iterable[str], stages: Mapping[str, StageConfig]) -> dict[str, tuple[str, int | None]]:
    """Dotted keys of settings as the stages are called once they are unrolled -> as they are typed, and which entry of
    what is typed they are, where that is a list over the rounds."""
    found: dict[str, tuple[str, int | None]] = {}
    for key in keys:
        parts = re.fullmatch(r"stages\.(\w+)\.(stages|by_round)\.(.+)", key)
        group = stages.get(parts[1]) if parts else None
        if parts and isinstance(group, RoundsStage):
            each = parts[2] == "by_round"
            found |= {
                f"stages.{parts[1]}{turn + 1}.{parts[3]}": (key, turn if each else None) for turn in range(group.rounds)
            }
        else:
            found[key] = key, None
    return found


def published_in_round(key: str, value: Any, turn: int | None, stages: Mapping[str, StageConfig]) -> Any:
    """What the recipe says in one round for a setting that the user has set.

    Args:
        key: as it is typed.
        value: what the recipe has there.
        turn: of the round, where it is typed for each of them; none: for all.
        stages: of the recipe, not yet unrolled.
    """
    if turn is None:
        return value
    if isinstance(value, list) and value:
        return value[min(turn, len(value) - 1)]  # its last, where the user has asked for more rounds
    _, name, _, own, *path = key.split(".")  # the recipe has the same in all rounds
    group = stages[name]
    assert isinstance(group, RoundsStage), "unrolled_keys says so"
    return functools.reduce(getattr, path, group.stages[own])


def refuse_twice(keys: Iterable[str], stages: Mapping[str, StageConfig]) -> None:
    """Refuse a setting of the user's for all rounds where the recipe has one for each, which would win.

    Args:
        keys: that the user has set.

    Raises:
        UserError: names what to set instead.
    """
    pinned = set(keys)
    for key in sorted(pinned):
        parts = re.fullmatch(r"stages\.(\w+)\.stages\.(.+)", key)
        group = stages.get(parts[1]) if parts else None
        if not parts or not isinstance(group, RoundsStage):
            continue
        at: Any = group.by_round
        for step in parts[2].split("."):
            at = at.get(step) if isinstance(at, dict) else None
        instead = f"stages.{parts[1]}.by_round.{parts[2]}"
        if isinstance(at, list) and instead not in pinned:
            raise UserError(key, "is another one in each round", f"Give {instead}=[...], one for each of them")


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
