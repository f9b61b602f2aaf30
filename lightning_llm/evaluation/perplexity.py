"""How well held-out text is predicted: perplexity by domain, loss by position, and what a long context is worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics.aggregation import MeanMetric

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.packing import next_cut
from lightning_llm.data.token_store import TokenStore
from lightning_llm.models import Transformer
from lightning_llm.objectives.base import token_logps

LARGEST_SHARE = 8  # one document gives at most this part of a domain's tokens
WINDOWS_OF_A_DOCUMENT = 2  # where loss by position is measured


def sample_text(store: TokenStore, tokens: int) -> list[np.ndarray]:
    """The beginnings of held-out documents, about `tokens` together: the same for every stage and model.

    A document gives at most an eighth, so that the longest does not stand for its domain.
    """
    chosen, left = [], tokens
    for row in range(store.rows):
        document = store.row(row).segments[0][: min(left, max(tokens // LARGEST_SHARE, 2))]
        if left < 2:
            break
        chosen.append(document)
        left -= len(document)
    return chosen


def sample_windows(stores: Mapping[str, TokenStore], context: int, documents: int) -> list[np.ndarray]:
    """Windows of exactly `context` tokens, cut at multiples of it, out of documents at least as long.

    Domains take turns, and of each document its first few windows are taken.

    Args:
        documents: at most so many of them, all domains together.
    """
    by_domain = [
        [store.row(row).segments[0] for row in np.flatnonzero(store.row_lengths >= context)[:documents].tolist()]
        for store in stores.values()
    ]
    chosen = [d for turn in itertools.zip_longest(*by_domain) for d in turn if d is not None][:documents]
    return [
        document[begin : begin + context]
        for document in chosen
        for begin in range(0, len(document) - context + 1, context)[:WINDOWS_OF_A_DOCUMENT]
    ]


def mean_loss(model: Transformer, documents: Sequence[np.ndarray], context: int, max_tokens: int) -> MeanMetric:
    """Loss per token in nats, over documents cut as in training; `compute()` it, over all ranks if there are several.

    Args:
        context: documents are cut at multiples of it.
        max_tokens: of one forward pass.
    """
    mean = MeanMetric().to(model.head_weight.device)
    mean.set_dtype(torch.float64)
    for batch in _batches(itertools.chain.from_iterable(_cut(d, context) for d in documents), max_tokens):
        logps = token_logps(model, batch.to(model.head_weight.device))  # [N]
        if len(logps):
            mean.update(-logps.double().mean(), weight=len(logps))
    return mean


def losses_by_position(model: Transformer, windows: Sequence[np.ndarray], max_tokens: int) -> Tensor:
    """Loss of every token but the first of windows of equal length L, in nats: [windows, L - 1] float32, on the CPU."""
    device = model.head_weight.device
    losses = [-token_logps(model, batch.to(device)).float().cpu() for batch in _batches(windows, max_tokens)]
    return torch.cat(losses).unflatten(0, (len(windows), -1))


@dataclass(frozen=True)
class LateLoss:
    """Mean loss of the same late tokens, in nats, with much and with little before them."""

    full: float
    short: float

    @property
    def gain(self) -> float:
        """What the longer context saves."""
        return self.short - self.full


def late_loss(
    model: Transformer, windows: Sequence[np.ndarray], losses: Tensor, short_context: int, max_tokens: int
) -> LateLoss:
    """The last tokens of each window, once with all of the window before them, once with its last short context alone.

    Scored are the last half of a short context, so that even there each token has half of it before itself.

    Args:
        windows: of equal length, longer than `short_context`.
        losses: of these windows, from `losses_by_position`: [windows, L - 1].
        short_context: tokens.
    """
    short = losses_by_position(model, [window[-short_context:] for window in windows], max_tokens)
    scored = slice(-(short_context // 2), None)
    return LateLoss(losses[:, scored].double().mean().item(), short[:, scored].double().mean().item())


def position_curve(losses: Tensor) -> dict[str, list[float]]:
    """Mean losses over ranges of positions, two to an octave: what the page draws.

    Args:
        losses: [windows, L - 1], of the tokens at positions 1 to L - 1.

    Returns:
        `begin`, `end`: the positions [begin, end) of each range; `loss`: its mean in nats.
    """
    end = losses.shape[1] + 1
    octaves = itertools.takewhile(lambda start: start < end, (2**k for k in itertools.count()))
    edges = sorted({edge for start in octaves for edge in (start, start * 3 // 2) if edge < end})
    ranges = list(itertools.pairwise([*edges, end]))
    return {
        "begin": [a for a, _ in ranges],
        "end": [b for _, b in ranges],
        "loss": [losses[:, a - 1 : b - 1].double().mean().item() for a, b in ranges],
    }


def _cut(document: np.ndarray, context: int) -> Iterator[np.ndarray]:
    begin = 0
    while begin < len(document):
        end = next_cut(begin, len(document), context)
        yield document[begin:end]
        begin = end


def _batches(pieces: Iterable[np.ndarray], max_tokens: int) -> Iterator[SegmentBatch]:
    together: list[np.ndarray] = []
    for piece in pieces:
        if together and sum(map(len, together)) + len(piece) > max_tokens:
            yield SegmentBatch.from_documents(together)
            together = []
        together.append(piece)
    if together:
        yield SegmentBatch.from_documents(together)
