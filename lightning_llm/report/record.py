"""What a run folder says, as plain values: the plan's nodes, what became of each, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_llm.settings import UserError
from lightning_llm.stages.config import MODELS

CURVES = "metrics.jsonl"  # a training stage's figures over its tokens
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}  # of controls


@dataclass(frozen=True)
class Node:
    """One stage of the plan and what became of it."""

    name: str
    kind: str
    inputs: dict[str, str]  # role -> name of the node it comes from; inputs from elsewhere are left out
    planned: dict[str, Any]  # tokens, steps, context, parameters, flops, objective, starts_from ...
    record: dict[str, Any] | None = None  # its stage.json; none: not made
    reused: bool = False  # it was there before this run
    curves: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl
    files: dict[str, Any] = field(default_factory=dict)  # the artifact's JSON files by name

    @property
    def is_made(self) -> bool:
        """Whether its artifact is there."""
        return self.record is not None

    @property
    def metrics(self) -> dict[str, float]:
        """What its stage.json measured; empty if it is not made."""
        return (self.record or {}).get("metrics") or {}

    @property
    def seconds(self) -> float | None:
        """That making it took, if it says so."""
        return ((self.record or {}).get("seconds") or {}).get("total")

    @property
    def bytes(self) -> int | None:
        """Of its artifact's files, if it says so."""
        files = (self.record or {}).get("files")
        return sum(file.get("bytes", 0) for file in files.values()) if isinstance(files, dict) else None

    def get(self, figure: str) -> Any:
        """A figure of the stage as it was made, else as it was planned."""
        record = self.record or {}
        for place in (self.metrics, record, record.get("settings") or {}, self.planned):
            value = place.get(figure)
            if value is not None and not isinstance(value, dict | list):
                return value
        return None

    @property
    def training(self) -> list[dict[str, Any]]:
        """Lines of training steps."""
        return [line for line in self.curves if "loss" in line]

    @property
    def validation(self) -> list[dict[str, Any]]:
        """Lines of validations."""
        return [line for line in self.curves if "validation/loss" in line]


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    facts: dict[str, Any]  # run.json
    recipe: dict[str, Any]  # recipe.json: the scaled recipe
    plan: dict[str, Any]  # plan.json
    nodes: list[Node]  # in the order of the plan
    problems: list[str]  # what could not be read
    label: str = ""  # what sets it apart from the runs beside it

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """Every node under its name."""
        return {node.name: node for node in self.nodes}

    @property
    def folder_name(self) -> str:
        """The last part of its path, links followed."""
        return self.folder.resolve().name

    @property
    def name(self) -> str:
        """What it is called beside other runs."""
        return self.label or self.folder_name

    @property
    def title(self) -> str:
        """Its recipe's name, or that of the folder it lies in."""
        return str(self.facts.get("recipe") or self.folder.resolve().parent.name)

    @property
    def scale(self) -> str | None:
        """Its scale's name, if it is known."""
        scale = self.facts.get("scale") or self.recipe.get("scale")
        return scale.get("name") if isinstance(scale, dict) else scale

    @property
    def seed(self) -> Any:
        """Its seed, if it is known."""
        return self.facts.get("seed", self.recipe.get("seed"))

    @property
    def trained(self) -> list[Node]:
        """Training stages, made or not."""
        return [node for node in self.nodes if node.kind == "train"]

    @property
    def models(self) -> list[Node]:
        """Stages that leave a model, made or not."""
        return [node for node in self.nodes if node.kind in MODELS]

    @property
    def evaluated(self) -> list[Node]:
        """Those whose model was measured."""
        return [node for node in self.models if self.results(node)]

    @property
    def missing(self) -> list[Node]:
        """Nodes without an artifact."""
        return [node for node in self.nodes if not node.is_made]

    def evaluation(self, stage: Node) -> Node | None:
        """The evaluation of a training stage, if it was made."""
        node = self.by_name.get(f"{stage.name}.evaluate")
        return node if node and node.is_made else None

    def results(self, stage: Node) -> dict[str, float]:
        """Metrics of a training stage's evaluation."""
        node = self.evaluation(stage)
        return node.metrics if node else {}


def visible(text: Any) -> str:
    """What a model has said, with Unicode's pictures in the place of control characters: a page may hold none."""
    return str(text).translate(PICTURES)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; what is missing in one is noted, what is no run folder is refused."""
    if not folders:
        raise UserError(
            "report", "no run is named", "Name run folders, one or several: lightning-llm report runs/qwen2/*"
        )
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> Run:
    """Read one run folder; what is missing or damaged in it is noted.

    Raises:
        UserError: it is no run folder.
    """
    if not any((folder / name).is_file() for name in ("run.json", "plan.json")):
        raise UserError(str(folder), "is no run folder (no run.json, no plan.json)", "Name the folder that run printed")
    problems: list[str] = []
    facts = _read(folder / "run.json", problems)
    plan = _read(folder / "plan.json", problems)
    recipe = _read(folder / "recipe.json", problems)
    artifacts = sorted(path.name for path in (folder / "artifacts").glob("*"))
    planned = [stage for stage in plan.get("stages", []) if isinstance(stage, dict) and "name" in stage]
    known = {stage["name"] for stage in planned}
    planned += [{"name": name} for name in artifacts if name not in known]  # no plan: what there is, in some order
    nodes = [_read_node(folder, stage, facts.get("stages", {}).get(stage["name"], {}), problems) for stage in planned]
    return Run(folder, facts, recipe, plan, _with_inputs(nodes), problems)


def _read_node(folder: Path, planned: dict[str, Any], fact: dict[str, Any], problems: list[str]) -> Node:
    name = planned["name"]
    artifact = folder / "artifacts" / name
    record, curves, files = None, [], {}
    if (artifact / "stage.json").is_file():
        record = _read(artifact / "stage.json", problems) or None
        curves = list(_lines(artifact / CURVES, problems)) if (artifact / CURVES).is_file() else []
        others = [path for path in sorted(artifact.glob("*.json")) if path.name != "stage.json"]
        files = {path.name: _read(path, problems, kind=(dict, list)) for path in others}
    elif artifact.is_symlink():
        problems.append(f"artifacts/{name} points to an artifact that is no longer there")
    kind = planned.get("kind") or (record or {}).get("kind") or "stage"
    inputs = {role: str(source) for role, source in (planned.get("inputs") or {}).items()}
    return Node(name, kind, inputs, planned, record, bool(fact.get("reused")), curves, files)


def _with_inputs(nodes: list[Node]) -> list[Node]:
    """Keep the edges between nodes; where the plan names none, take them from the keys in stage.json."""
    names = {node.name for node in nodes}
    by_key = {node.record["key"]: node.name for node in nodes if node.record and "key" in node.record}
    found = []
    for node in nodes:
        recorded = (node.record or {}).get("inputs") or {}
        keys = {role: by_key.get(source.get("key", "")) for role, source in recorded.items()}
        inputs = {role: source for role, source in (node.inputs or keys).items() if source in names}
        found.append(Node(**{**vars(node), "inputs": inputs}))
    return found


def _read(path: Path, problems: list[str], kind: Any = dict) -> Any:
    """A JSON file; an empty dict, and a line in `problems`, where there is none that can be read."""
    where = f"{path.parent.name}/{path.name}" if path.name == "stage.json" else path.name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{where} is missing")
    except (OSError, ValueError):
        problems.append(f"{where} cannot be read")
    else:
        if isinstance(content, kind):
            return content
        problems.append(f"{where} is not what it should be")
    return {}


def _lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file; one that was cut while being written is left out."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
        except ValueError:
            problems.append(f"{path.parent.name}/{path.name}:{number} cannot be read")
        else:
            yield content
