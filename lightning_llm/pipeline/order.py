"""Which stage comes before which: `starts_from` as a graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_llm.pipeline.names import name_nearest
from lightning_llm.settings import UserError
from lightning_llm.stages.config import TrainStage


def order_of_stages(stages: Mapping[str, TrainStage]) -> list[str]:
    """Names of the stages, each after the one that it starts from.

    Raises:
        UserError: a stage starts from what is neither a stage nor a folder, or from itself in the end.
    """
    for name, stage in stages.items():
        source = stage.starts_from
        earlier = [other for other in stages if not _descends(other, name, stages)]
        if source is not None and source not in stages and not Path(source).expanduser().is_dir():
            raise UserError(
                f"stages.{name}.starts_from",
                f"{source} is neither a stage nor a folder with a model",
                name_nearest(source, earlier) if earlier else "Name a folder, or take it away: starts_from=null",
            )
    order: list[str] = []
    for name in stages:
        chain: list[str] = []
        at: str | None = name
        while at is not None and at not in order:
            if at in chain:
                circle = " -> ".join([*chain[chain.index(at) :], at])
                raise UserError(
                    f"stages.{at}.starts_from", f"goes round in a circle ({circle})", "Let one of them start anew"
                )
            chain.append(at)
            at = stages[at].starts_from if stages[at].starts_from in stages else None
        order += reversed(chain)
    return order


def _descends(stage: str, ancestor: str, stages: Mapping[str, TrainStage]) -> bool:
    """Whether a stage is `ancestor` or starts, in the end, from it."""
    seen: set[str] = set()
    at: str | None = stage
    while at is not None and at in stages and at not in seen:
        if at == ancestor:
            return True
        seen.add(at)
        at = stages[at].starts_from
    return False
