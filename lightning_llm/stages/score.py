"""The verb score: log-probability of every target token of prepared data under a frozen model.

Leaves `<source>/<split>/logps.bin`: float32 nats, one for each token of the same source and split's tokens.bin, 0 where
nothing counts. `StageData(token_columns=...)` makes a column of it.
"""

from __future__ import annotations

import numpy as np
import torch

from lightning_llm.data.packing import Feed, iterate_batches
from lightning_llm.data.token_store import TokenStore
from lightning_llm.models import Transformer
from lightning_llm.models.kernels import use_attention
from lightning_llm.models.size import forward_flops
from lightning_llm.objectives.base import token_logps
from lightning_llm.stages.config import ScoreSettings
from lightning_llm.stages.context import StageContext, StageResult, model_directory, refuse_other_tokenizer, threads


def run(context: StageContext) -> StageResult:
    """Score every source and split of the data, on one device.

    Raises:
        UserError: the model has another tokenizer than the data.
    """
    refuse_other_tokenizer(f"stage {context.name}", context.inputs)
    with torch.no_grad(), threads(context.compute.threads):
        return score(context)


def score(context: StageContext) -> StageResult:
    """The body of the stage: log-probabilities of the targets of every row, in nats, by (row, token)."""
    settings: ScoreSettings = context.settings
    device = torch.device("cuda" if context.compute.accelerator == "gpu" else "cpu")
    model = Transformer.from_pretrained(model_directory(context.inputs["model"])).eval().to(device)
    use_attention(model, context.compute, precision=settings.precision, needs_gradient=False)
    stores = {
        (folder.name, split): TokenStore.open(folder / split)
        for folder in sorted((context.inputs["data"] / "sources").iterdir())
        for split in settings.split
    }
    total = sum(store.tokens for store in stores.values())
    tokens = targets = 0
    logp_sum = flops = 0.0
    ledger: dict[str, int] = {}
    for (source, split), store in stores.items():
        logps = np.zeros(store.tokens, np.float32)
        feed = Feed(source, store, settings.context, settings.on_long, {})
        for batch, origins in iterate_batches(feed, settings.context, context.compute.micro_batch_tokens):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                values = token_logps(model, batch.to(device)).float().cpu().numpy()  # [N]
            logps[origins[batch.target_positions.numpy()]] = values
            logp_sum += float(values.sum(dtype=np.float64))
            tokens, targets = tokens + batch.num_tokens, targets + sum(batch.target_counts)
            flops += forward_flops(model.config, batch.extents)
            context.console.update(tokens, total, "tok")
        path = context.output / source / split / "logps.bin"
        path.parent.mkdir(parents=True)
        logps.tofile(path)
        ledger[source] = ledger.get(source, 0) + store.tokens
    metrics = {"tokens": tokens, "targets": targets, "logps/mean": logp_sum / max(targets, 1)}
    return StageResult(metrics, ledger, flops)
