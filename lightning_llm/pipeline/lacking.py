"""What prepared rows lack of what stages go by: told as soon as they are prepared, before anything trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_llm.objectives.config import RewardModelConfig
from lightning_llm.pipeline.expand import Node
from lightning_llm.settings import UserError
from lightning_llm.stages.config import GenerateSettings, JudgeSettings, TrainSettings

Rows = list[dict[str, Any]]


def refuse_lacking(prepared: Node, artifact: Path, nodes: Sequence[Node], to_make: Sequence[Node]) -> None:
    """Refuse rows without the answer or the tests that a judge goes by, and grades that no row has.

    Args:
        prepared: a node that has prepared rows.
        artifact: what it has left.
        nodes: of the run.
        to_make: those of them that are not in the store yet.

    Raises:
        UserError: names the key, the source and the first of the rows.
    """
    for node in to_make:
        settings = node.settings
        if isinstance(settings, JudgeSettings):
            for asking in _samplers(node, prepared, nodes):
                sources = [name for name, weight in asking.settings.weights.items() if weight]
                _refuse_unjudged(node, prepared, artifact, sources, ["train"])
        elif isinstance(settings, TrainSettings) and node.inputs["data"] == prepared.name:
            if settings.judge is not None:
                sources = [name for name, source in settings.data.sources.items() if source.weight]
                _refuse_unjudged(node, prepared, artifact, sources, ["train", "validation"])
            if isinstance(settings.objective, RewardModelConfig):
                _refuse_ungraded(node, settings.objective.graded, prepared, artifact)


def _samplers(judging: Node, prepared: Node, nodes: Sequence[Node]) -> Iterator[Node]:
    """The nodes that sample responses to prepared rows for a node that judges them."""
    asked = {source for role, source in judging.inputs.items() if role.startswith("samples.")}
    for node in nodes:
        if isinstance(node.settings, GenerateSettings) and node.name in asked and node.inputs["data"] == prepared.name:
            yield node


def _refuse_unjudged(node: Node, prepared: Node, artifact: Path, sources: Sequence[str], splits: Sequence[str]) -> None:
    judge, data = node.settings.judge, f"stages.{prepared.stage}.data"
    for field, name in ((field, name) for field in judge.needs_fields for name in sources):
        rows = _rows(artifact, name, splits)
        without = [row for row in rows if not row.get(field)]
        if not without:
            continue
        path, first = prepared.settings.data.sources[name].path, without[0]["prompt"][-1]["content"]
        what = (
            f"asks {judge.name}, which goes by a row's `{field}`, and {len(without):,} of {len(rows):,} rows of {path} "
        )
        left_out = f", leave them out ({data}.form=questions {data}.on_error=skip)" if field == "answer" else ""
        raise UserError(
            f"stages.{node.name}.judge",
            f"{what}({data}.sources.{name}) have none, the first: {first[:40]!r}",
            f"Give them one{left_out}, or choose another judge",
        )


def _refuse_ungraded(node: Node, graded: Sequence[str], prepared: Node, artifact: Path) -> None:
    if not graded:
        return
    sources = prepared.settings.data.sources
    responses = [
        grades
        for name in sources
        for row in _rows(artifact, name, ["train"])
        for grades in row.get("grades", {}).values()
    ]
    known = {name for grades in responses for name in grades}
    for name in graded:
        if name not in known:
            paths = ", ".join(str(source.path) for source in sources.values())
            embedded = next(
                (source for source, config in sources.items() if config.path == "embedded:comparisons"), None
            )
            option = f" (+scale.corpora.{embedded}.options.graded=true grades the truthfulness)" if embedded else ""
            raise UserError(
                f"stages.{node.name}.objective.graded",
                f"has {name}, and no row of {paths} is graded for it",
                f"Give the rows grades of it, or take it out{option}",
            )


def _rows(artifact: Path, source: str, splits: Sequence[str]) -> Rows:
    """What is known of the prepared rows of a source."""
    from lightning_llm.data.token_store import TokenStore  # knows torch: the plan does not

    stores = (TokenStore.open(artifact / "sources" / source / split) for split in splits)
    return [row for store in stores for row in store.metadata()]
