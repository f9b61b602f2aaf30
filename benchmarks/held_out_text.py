"""How well a model predicts the held-out text of a run, the same for every model that reads it."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.token_store import TokenStore
from lightning_llm.evaluation.perplexity import sample_text
from lightning_llm.models import Transformer
from lightning_llm.stages.context import model_directory

HELD_OUT = 12_000  # tokens of each domain
CONTEXT = 128  # of a document


def batches(prepared: Path) -> list[SegmentBatch]:
    """A batch a domain, of what the artifact of a node `prepare` holds back."""
    found = []
    for source in sorted((prepared / "sources").iterdir()):
        documents = sample_text(TokenStore.open(source / "validation"), HELD_OUT)
        pieces = [text[begin : begin + CONTEXT] for text in documents for begin in range(0, len(text), CONTEXT)]
        found.append(SegmentBatch.from_documents([piece for piece in pieces if len(piece) > 1]))
    return found


@torch.no_grad()
def measure(artifact: Path, prepared: Path) -> dict[str, float]:
    """Nats per token, and the share of tokens that the model finds likeliest: means over the domains."""
    model = Transformer.from_pretrained(model_directory(artifact)).eval()
    nats, right = [], []
    for batch in batches(prepared):
        hidden = model(batch)[batch.predictors]
        nats.append(float(-model.log_likelihood(hidden, batch.target_ids).mean()))
        ids, _ = model.top_log_probabilities(hidden, batch.target_ids, 1)
        right.append(float((ids[:, 0] == batch.target_ids).float().mean()))
    size = sum(parameter.numel() for parameter in model.parameters())
    return {"nats": statistics.fmean(nats), "right": statistics.fmean(right), "parameters": size}
