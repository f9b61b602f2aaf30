"""Settings of runs as text: the recipe as YAML, the environment, and the settings in which several runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning_llm.report.numbers import NOTHING
from lightning_llm.report.record import Run

MOST_IN_A_LABEL = 3  # settings
BOOKKEEPING = ("pinned", "published", "is_scaled")  # of recipe.json: how the figures came about
ELSEWHERE = (*BOOKKEEPING, "overrides", "store", "runs", "limits")  # no difference in what was trained


def recipe_text(run: Run) -> str:
    """The scaled recipe as YAML, without what is not set."""
    import yaml

    return yaml.safe_dump(
        _without_nothing(run.recipe), sort_keys=False, allow_unicode=True, width=110, default_flow_style=None
    )


def environment(run: Run) -> dict[str, str]:
    """Where the artifacts were made; several values where they were made in several places."""
    found: dict[str, dict[str, None]] = {}
    for record in (node.record for node in run.nodes if node.record):
        facts = {
            "lightning_llm": record.get("code_version"),
            "commit": (record.get("git") or {}).get("commit"),
            "device": record.get("device"),
            "processor": record.get("cpu_capability"),
            "threads": record.get("threads"),
            **(record.get("libraries") or {}),
        }
        for name, value in facts.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(values) for name, values in found.items()}


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings of the scaled recipes that are not the same in all runs: dotted key -> value of each."""
    flat = [dict(_leaves({name: value for name, value in run.recipe.items() if name not in ELSEWHERE})) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: [str(settings.get(key, NOTHING)) for settings in flat] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def labelled(runs: Sequence[Run]) -> list[Run]:
    """The runs of a sweep called by the few settings in which they differ (`seed 0, beta 0.1`) instead of by a time."""
    found = differences(runs)
    labels = [
        ", ".join(f"{key.rpartition('.')[2]} {values[i]}" for key, values in found.items()) for i in range(len(runs))
    ]
    if not 1 <= len(found) <= MOST_IN_A_LABEL or len(set(labels)) < len(runs):
        return list(runs)
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _without_nothing(tree: Any) -> Any:
    if isinstance(tree, dict):
        kept = {key: _without_nothing(value) for key, value in tree.items() if key not in BOOKKEEPING}
        return {key: value for key, value in kept.items() if value is not None and value not in ({}, [])}
    return tree


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
