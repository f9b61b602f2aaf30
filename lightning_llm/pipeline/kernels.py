"""Which attention kernels a run will compute with: refused or said before its first stage, for all of its models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning_llm.models.config import ModelConfig
from lightning_llm.pipeline.expand import Node
from lightning_llm.pipeline.remade import shape_left
from lightning_llm.settings import UserError
from lightning_llm.stages.config import ComputeConfig
from lightning_llm.stages.context import model_directory

REMADE = ("prune", "upcycle")  # verbs that make another model of one
FROZEN = ("score", "evaluate", "generate")  # verbs that compute with models and train none


def made_models(nodes: Iterable[Node]) -> dict[str, ModelConfig]:
    """What the stages that make models leave, by their names.

    Args:
        nodes: each after its inputs.
    """
    made: dict[str, ModelConfig] = {}
    for node in nodes:
        if node.kind == "train":
            made[node.name] = node.settings.model
        elif node.kind == "merge":
            made[node.name] = shape_of(node.inputs["model.0"], made)
        elif node.kind in REMADE:
            made[node.name] = shape_left(node, shape_of(node.inputs["starts_from"], made))
    return made


def attention_lines(compute: ComputeConfig, nodes: Sequence[Node], trained: Mapping[str, ModelConfig]) -> list[str]:
    """A line for each way of computing attention; with the names of the nodes where there are several.

    Args:
        nodes: that are to be made.
        trained: `made_models` of all nodes of the plan; other models are read where they lie.

    Raises:
        UserError: `compute.attention` cannot do what a model asks, or is installed and broken.
    """
    said: dict[str, list[str]] = {}
    for node in nodes:
        trains = node.kind == "train"
        models = [(node.settings.model, True)] if trains else []
        if trains or node.kind in FROZEN or (node.kind == "prune" and node.settings.tokens):
            asked = [source for role, source in node.inputs.items() if _is_asked(role, trains)]
            models += [(shape_of(source, trained), False) for source in asked]
        for model, needs_gradient in models:
            line = _line(model, compute, needs_gradient)
            if node.name not in (names := said.setdefault(line, [])):
                names.append(node.name)
    if len(said) == 1:
        return list(said)
    return [f"{', '.join(names)}: {line}" for line, names in said.items()]


def refused_attention(
    compute: ComputeConfig, nodes: Sequence[Node], trained: Mapping[str, ModelConfig]
) -> tuple[str, ...]:
    """What a plan says of a kernel that a CPU does not have. What a GPU has only the machine that runs it can tell."""
    if compute.attention == "auto" or compute.accelerator != "cpu":
        return ()  # without torch, which takes a second to import
    try:
        attention_lines(compute, nodes, trained)
    except UserError as error:
        return (f"{error.where}: {error.what}; a run would refuse it",)
    return ()


def _line(model: ModelConfig, compute: ComputeConfig, needs_gradient: bool) -> str:
    from lightning_llm.models.kernels import attention_line  # knows torch

    return attention_line(model, compute, precision=compute.precision, needs_gradient=needs_gradient)


def _is_asked(role: str, trains: bool) -> bool:
    if trains:
        return role == "teacher_model"
    return role in ("model", "starts_from") or role.startswith("model.")


def shape_of(source: str, trained: Mapping[str, ModelConfig]) -> ModelConfig:
    """Of what a stage leaves, by its name, or of a model of elsewhere, by its path."""
    if source in trained:
        return trained[source]
    from lightning_llm.models.families import read_config

    return read_config(model_directory(Path(source)))
