"""The verb prune: a smaller model of one, made of the parts that matter most.

Leaves `model/`, a Hugging Face directory with the parent's tokenizer, and `kept.json`: which parts of the parent it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields

import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.packing import StageData
from lightning_llm.models import Transformer
from lightning_llm.models.kernels import use_attention
from lightning_llm.models.masked import read_scores
from lightning_llm.models.prune import Kept, chosen, cut
from lightning_llm.models.size import forward_flops, parameter_counts
from lightning_llm.settings import UserError
from lightning_llm.stages.beside import copy_beside, end_tokens
from lightning_llm.stages.config import PruneSettings
from lightning_llm.stages.context import (
    StageContext,
    StageResult,
    model_directory,
    refuse_other_tokenizer,
    threads,
)
from lightning_llm.training.phases import Phases


def run(context: StageContext) -> StageResult:
    """Measure what matters in the input `starts_from`, on one device, and cut the rest away.

    Raises:
        UserError: the model has not learnt the masks that are asked for, is smaller than what is to stay, or has
            another tokenizer than the data.
    """
    if "data" in context.inputs:
        refuse_other_tokenizer(f"stage {context.name}", context.inputs)
    with torch.no_grad(), threads(context.compute.threads):
        return prune(context)


def prune(context: StageContext) -> StageResult:
    """The body of the stage."""
    settings: PruneSettings = context.settings
    directory, phases = model_directory(context.inputs["starts_from"]), Phases()
    scores = read_scores(directory)
    if settings.method.needs_masks and scores is None:
        what = f"{directory} has learnt no masks"
        remedy = "Name a stage whose objective is pruning_masks, or choose another method, as activation"
        raise UserError("starts_from", what, remedy)
    with phases("load"):
        device = torch.device("cuda" if context.compute.accelerator == "gpu" else "cpu")
        parent = Transformer.from_pretrained(directory).eval().to(device)
        use_attention(parent, context.compute, precision=settings.precision, needs_gradient=False)
    measured = Measured(context, parent)
    with phases("measure"), torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        importance = settings.method.build(parent, measured, scores)
    with phases("cut"):
        kept = chosen(importance, settings.sizes)
        child = cut(parent.cpu(), on_cpu(kept))
    with phases("save"):
        child.save_pretrained(context.output / "model", eos_token_ids=end_tokens(directory))
        copy_beside(directory, context.output / "model")
        (context.output / "kept.json").write_text(json.dumps(indices(kept)) + "\n", "utf-8")
    before, after = (parameter_counts(model.config)["total"] for model in (parent, child))
    metrics = {"parameters": after, "parameters/share": after / before}
    return StageResult(metrics, measured.ledger, measured.flops, phases.seconds)


class Measured:
    """Batches of the stage's data that flow through its model, each once; what they were is known afterwards."""

    def __init__(self, context: StageContext, model: Transformer):
        self.context, self.model = context, model
        self.ledger: dict[str, int] = {}
        self.flops = 0.0

    def __iter__(self) -> Iterator[SegmentBatch]:
        settings: PruneSettings = self.context.settings
        data = StageData(
            self.context.inputs["data"],
            settings.data,
            context_ramp=settings.context,
            batch_ramp=min(self.context.compute.micro_batch_tokens, settings.tokens),
            total_tokens=settings.tokens,
            seed=settings.seed,
        )
        device = self.model.embed_tokens.weight.device
        for step in range(data.steps):
            window = data.window(step, micro_batch_tokens=self.context.compute.micro_batch_tokens)
            for batch in window.mine:
                yield batch.to(device)
            self.flops += forward_flops(self.model.config, window.segments)
            self.context.console.update(window.progress.tokens, settings.tokens, "tok")
        self.ledger = data.ledger(data.steps)


def on_cpu(kept: Kept) -> Kept:
    """The same indices there."""
    parts = {f.name: getattr(kept, f.name) for f in fields(kept)}
    return Kept(**{name: None if part is None else part.cpu() for name, part in parts.items()})


def indices(kept: Kept) -> dict[str, list[int] | list[list[int]]]:
    """What stays as JSON; parts of which everything stays are left out."""
    parts = {f.name: getattr(kept, f.name) for f in fields(kept)}
    return {name: part.tolist() for name, part in parts.items() if part is not None}
