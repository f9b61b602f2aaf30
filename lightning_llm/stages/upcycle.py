"""The verb upcycle: a mixture of experts of a dense model.

Leaves `model/`, a Hugging Face directory with the dense model's tokenizer.
"""

from __future__ import annotations

from lightning_llm.models import Transformer
from lightning_llm.models.derived import upcycled
from lightning_llm.models.size import parameter_counts
from lightning_llm.models.upcycle import upcycle
from lightning_llm.stages.beside import copy_beside, end_tokens
from lightning_llm.stages.config import UpcycleSettings
from lightning_llm.stages.context import StageContext, StageResult, model_directory, threads
from lightning_llm.training.phases import Phases


def run(context: StageContext) -> StageResult:
    """Make experts of the feed-forwards of the input `starts_from`."""
    settings: UpcycleSettings = context.settings
    directory, phases = model_directory(context.inputs["starts_from"]), Phases()
    with threads(context.compute.threads):
        with phases("load"):
            dense = Transformer.from_pretrained(directory)
        with phases("upcycle"):
            mixture = upcycle(
                dense,
                upcycled(dense.config, settings.mixture),
                experts=settings.experts,
                reinitialised=settings.reinitialised,
                of=settings.of,
                keeps_scale=settings.keeps_scale,
                seed=settings.seed,
            )
        with phases("save"):
            mixture.save_pretrained(context.output / "model", eos_token_ids=end_tokens(directory))
            copy_beside(directory, context.output / "model")
    counts = parameter_counts(mixture.config)
    metrics: dict[str, float] = {"parameters": counts["total"], "parameters/active": counts["active"]}
    return StageResult(metrics, seconds=phases.seconds)
