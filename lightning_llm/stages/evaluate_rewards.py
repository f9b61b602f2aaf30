"""The verb evaluate for a reward model: its scores against the comparisons that its own data holds out.

Leaves `metrics.json` (the same figures as in stage.json) and `calibration.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.packing import Feed, iterate_batches
from lightning_llm.data.token_store import TokenStore
from lightning_llm.evaluation.rewards import calibration_table, reward_metrics, score_rankings
from lightning_llm.models.kernels import use_attention
from lightning_llm.models.reward import RewardModel
from lightning_llm.models.size import forward_flops
from lightning_llm.stages.config import EvaluateRewardsSettings
from lightning_llm.stages.context import (
    StageContext,
    StageResult,
    model_directory,
    refuse_other_tokenizer,
    threads,
)
from lightning_llm.training.phases import Phases


def evaluate_rewards(context: StageContext) -> StageResult:
    """Measure a reward model on one device.

    Raises:
        UserError: model, data and tokenizer do not belong together.
    """
    settings: EvaluateRewardsSettings = context.settings
    refuse_other_tokenizer(f"evaluation of {context.name}", context.inputs)
    feeds, phases = held_out(context), Phases()
    if not feeds:
        context.console.note("its data holds out no row: nothing is evaluated")
        return StageResult({})
    device = "cuda" if context.compute.accelerator == "gpu" else "cpu"
    with phases("load"):
        model = RewardModel.from_pretrained(model_directory(context.inputs["model"])).eval().to(device)
        use_attention(model, context.compute, precision=settings.precision, needs_gradient=False)
    segments: list[tuple[int, int]] = []

    def batches() -> Iterator[SegmentBatch]:
        each = math.ceil(settings.comparisons / len(feeds))
        for done, feed in enumerate(feeds):
            context.console.update(done, len(feeds), "sources")
            units = range(min(each, len(feed.lengths)))
            for batch, _ in iterate_batches(feed, settings.context, context.compute.micro_batch_tokens, units):
                segments.extend(batch.extents)
                yield batch.to(device)

    with (
        torch.inference_mode(),
        torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"),
        threads(context.compute.threads),
        phases("score"),
    ):
        found = score_rankings(model, batches())
    metrics = reward_metrics(found)
    chosen, rejected, _ = found.scores.unbind(1)
    for name, content in (("metrics", metrics), ("calibration", calibration_table(chosen - rejected, found.strength))):
        (context.output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    flops = forward_flops(model.config, segments, model.score_head)
    return StageResult(metrics, flops=flops, seconds=phases.seconds)


def held_out(context: StageContext) -> list[Feed]:
    """The held-out rows of each source that has some which fit the context."""
    settings: EvaluateRewardsSettings = context.settings
    paths = sorted((context.inputs["data"] / "sources").glob("*/validation/store.json"))
    feeds = [
        Feed(path.parts[-3], TokenStore.open(path.parent), settings.context, settings.on_long, {}) for path in paths
    ]
    return [feed for feed in feeds if len(feed.lengths)]
