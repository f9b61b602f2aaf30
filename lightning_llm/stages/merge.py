"""The verb merge: one model of several, tensor by tensor.

Leaves `model/`, a Hugging Face directory with the configuration and the tokenizer of the first model, in its files and
types. Memory is needed for the tensor that is written, and for a few blocks of entries of each model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.merging.spherical import inner_products
from lightning_llm.merging.states import State, blocks, differences
from lightning_llm.models import ModelConfig
from lightning_llm.models.families import CLASSIFIER, read_config, read_head
from lightning_llm.models.reward import GRADING_FILE
from lightning_llm.models.shards import Shards, refuse_unlike_shards, write_shards
from lightning_llm.settings import UserError
from lightning_llm.stages.beside import copy_beside
from lightning_llm.stages.config import MergeSettings
from lightning_llm.stages.context import StageContext, StageResult, model_directory, threads
from lightning_llm.training.phases import Phases

OWN = ("name", "tokenizer", "published", "max_position_embeddings")  # of a configuration: may differ between models


def run(context: StageContext) -> StageResult:
    """Merge the models in the inputs `model.0`, `model.1` and so on, which began as `starts_from` if that is there.

    Raises:
        UserError: they are of different architectures, heads or tokenizers, or one is damaged.
    """
    settings: MergeSettings = context.settings
    roles = sorted((r for r in context.inputs if r.startswith("model.")), key=lambda r: int(r.partition(".")[2]))
    directories = [model_directory(context.inputs[role]) for role in roles]
    start = model_directory(context.inputs["starts_from"]) if "starts_from" in context.inputs else None
    everyone = directories if start is None else [*directories, start]
    refuse_other_models(everyone)
    if settings.method.needs_scores and read_head(directories[0]) != CLASSIFIER:
        what = f"{directories[0]} speaks, and {settings.method.name} is for reward models"
        raise UserError("models", what, "Choose another method, as linear")
    output, phases = context.output / "model", Phases()
    output.mkdir()
    with threads(context.compute.threads):
        states = [Shards(directory) for directory in directories]
        began = None if start is None else Shards(start)
        refuse_unlike_shards(states if began is None else [*states, began])
        with phases("merge"):
            merged = settings.method.build(states, began, settings.seed)
            written = Finite(merged, states if began is None else [*states, began])
            write_shards(output, written, states[0], lambda done: context.console.update(done, len(merged), "tensors"))
        metrics: dict[str, float] = {"tensors": len(merged)}
        if began is not None and len(states) > 1:
            with phases("angle"):
                metrics["task_vectors/angle"] = mean_angle(began, states)
    copy_beside(directories[0], output, "config.json", "generation_config.json")
    merge_grading(directories, output, settings)
    return StageResult(metrics, seconds=phases.seconds)


class Finite(Mapping[str, Tensor]):
    """A merged state that is refused where it has numbers that are none."""

    def __init__(self, merged: State, sources: Sequence[Shards]):
        self.merged, self.sources = merged, sources

    def __getitem__(self, name: str) -> Tensor:
        """The merged tensor.

        Raises:
            UserError: it is not finite; names the directory whose tensor is to blame, if one is.
        """
        tensor = self.merged[name]
        if not is_finite(tensor):
            sick = next((source for source in self.sources if not is_finite(source[name])), None)
            where = f"{'the merged model' if sick is None else sick.directory}: {name}"
            remedy = "Merge in fp32, or with smaller weights" if sick is None else "Take another checkpoint"
            raise UserError(where, "holds numbers that are not finite", remedy)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.merged)

    def __len__(self) -> int:
        return len(self.merged)


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are; that their sum is says so in one pass without memory."""
    return math.isfinite(tensor.sum(dtype=torch.float32)) or bool(tensor.isfinite().all())


def refuse_other_models(directories: Sequence[Path]) -> None:
    """Refuse models that have not the configuration, the head and the tokenizer of the first.

    Raises:
        UserError: names the first difference.
    """
    first = directories[0]
    expected = read_config(first)
    for other in directories[1:]:
        found = read_config(other)
        for name in (f.name for f in fields(ModelConfig) if f.name not in OWN):
            if getattr(found, name) != getattr(expected, name):
                what = f"{name} is {getattr(found, name)}, in {first} {getattr(expected, name)}"
                raise UserError(f"{other}", what, "Merge models of one architecture")
        if read_head(other) != read_head(first):
            what = f"is {read_head(other)}, {first} is {read_head(first)}"
            raise UserError(f"{other}", what, "Merge either reward models or models that speak")
    with_one = [directory for directory in directories if (directory / "tokenizer.json").is_file()]
    fingerprints = {directory: Tokenizer.load(directory).fingerprint for directory in with_one}
    for other, fingerprint in fingerprints.items():
        if fingerprint != fingerprints[with_one[0]]:
            what = f"has another tokenizer (sha {fingerprint[:8]}) than {with_one[0]} ({fingerprints[with_one[0]][:8]})"
            raise UserError(f"{other}", what, "Merge models of one tokenizer")


def mean_angle(start: State, states: Sequence[State]) -> float:
    """Between the task vectors of whole models, in degrees, over all pairs.

    Vectors of models that learnt apart are nearly at right angles (WARP, appendix C.2); one that is 0 counts as such.
    """
    everyone = [start, *states]
    of_tensors = ((differences(*entries) for entries in blocks(everyone, name)) for name in start)
    products = sum(map(inner_products, of_tensors))
    lengths = np.sqrt(np.diag(products))  # pyright: ignore[reportArgumentType, reportCallIssue]
    norms = np.outer(lengths, lengths)
    cosines = np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)
    pairs = cosines[np.triu_indices(len(states), 1)]
    return math.degrees(float(np.mean(np.arccos(np.clip(pairs, -1, 1)))))


def merge_grading(directories: Sequence[Path], output: Path, settings: MergeSettings) -> None:
    """Networks that grade single responses, where every reward model has the same ones and no start is needed: no
    beginning has any. They are small."""
    files = [directory / GRADING_FILE for directory in directories]
    if settings.method.needs_start or not all(file.is_file() for file in files):
        return
    states = [load_file(file) for file in files]
    if all(state.keys() == states[0].keys() for state in states):
        save_file(dict(settings.method.build(states, None, settings.seed)), output / GRADING_FILE)
