"""Which stage comes before which: all that stages are made from, as a graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_llm.pipeline.names import name_nearest
from lightning_llm.settings import UserError
from lightning_llm.stages.config import Edge, MergeStage, PruneStage, StageConfig, TrainStage, UpcycleStage


def order_of_stages(stages: Mapping[str, StageConfig]) -> list[str]:
    """Names of the stages, each after all that it is made from.

    Raises:
        UserError: an edge leads to what is neither a stage nor a folder, to a stage of another kind, or in a circle.
    """
    for name, stage in stages.items():
        for edge in stage.edges():
            _check_edge(name, edge, stages)
    order: list[str] = []
    for name in stages:
        _append(name, stages, order, [])
    return order


def ancestors(name: str, stages: Mapping[str, StageConfig]) -> set[str]:
    """A stage and all stages that it is made from, directly or not."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        at = waiting.pop()
        if at in stages and at not in seen:
            seen.add(at)
            waiting += [edge.source for edge in stages[at].edges()]
    return seen


def unasked(stages: Mapping[str, StageConfig]) -> list[str]:
    """The optional stages that no other is made from, directly or not."""
    wanted = [name for name, stage in stages.items() if not getattr(stage, "optional", False)]
    needed = set[str]().union(*(ancestors(name, stages) for name in wanted))
    return [name for name in stages if name not in needed]


def trained_behind(name: str, stages: Mapping[str, StageConfig]) -> str | None:
    """The stage that has trained a model: itself, of what is merged the first, of what is pruned or upcycled its start.
    None: a model of elsewhere."""
    seen: set[str] = set()
    while name not in seen:  # who goes round in a circle is refused by the order of stages
        seen.add(name)
        stage = stages.get(name)
        if isinstance(stage, MergeStage) and stage.models:
            name = stage.models[0]
        elif isinstance(stage, PruneStage | UpcycleStage) and stage.starts_from is not None:
            name = stage.starts_from
        else:
            return name if isinstance(stage, TrainStage) else None
    return None


def before_gates(name: str, stages: Mapping[str, StageConfig]) -> str | None:
    """The model that a gate compares a stage with: the one that the first of several gated stages in a row started
    from, so that what each of them may lose does not add up. None: random weights."""
    stage = stages[name]
    assert isinstance(stage, TrainStage)
    if stage.starts_from is None:
        return None
    trained = trained_behind(stage.starts_from, stages)
    before = stages.get(trained or "")
    is_gated = isinstance(before, TrainStage) and before.gate.is_on
    return before_gates(trained, stages) if trained and is_gated else stage.starts_from


def _append(name: str, stages: Mapping[str, StageConfig], order: list[str], chain: list[str]) -> None:
    """Put a stage into the order, behind those that it is made from.

    Args:
        chain: the stages that wait for it, each of which is made from the next.
    """
    if name in order:
        return
    chain = [*chain, name]
    for edge in stages[name].edges():
        if edge.source in chain:
            circle = " -> ".join([*chain[chain.index(edge.source) :], edge.source])
            remedy = "Let one of them start anew" if edge.setting == "starts_from" else "Let it lead to another stage"
            raise UserError(f"stages.{name}.{edge.setting}", f"goes round in a circle ({circle})", remedy)
        if edge.source in stages:
            _append(edge.source, stages, order, chain)
    order.append(name)


def _check_edge(name: str, edge: Edge, stages: Mapping[str, StageConfig]) -> None:
    where, source = f"stages.{name}.{edge.setting}", edge.source
    earlier = [
        other
        for other, stage in stages.items()
        if stage.kind in edge.kinds
        and name not in ancestors(other, stages)
        and (edge.setting != "judged_by" or _scores(other, stages))
    ]
    if source in stages:
        if (kind := stages[source].kind) not in edge.kinds:
            what = f"{source} is a stage of kind {kind}, and one of kind {' or '.join(edge.kinds)} is wanted"
            raise UserError(where, what, name_nearest(source, earlier))
    elif not (edge.may_leave and Path(source).expanduser().is_dir()):
        what = f"{source} is neither a stage nor a folder with a model" if edge.may_leave else f"{source} is no stage"
        if edge.setting == "judged_by" and not earlier:
            raise UserError(where, what, "No stage trains a reward model. Add one: +stage@stages.NAME=reward_model")
        if edge.setting == "starts_from" and not earlier:
            raise UserError(where, what, "Name a folder, or take it away: starts_from=null")
        raise UserError(where, what, name_nearest(source, earlier))


def _scores(name: str, stages: Mapping[str, StageConfig]) -> bool:
    """Whether a stage leaves a reward model."""
    trained = stages.get(trained_behind(name, stages) or "")
    return isinstance(trained, TrainStage) and trained.objective.is_scored
