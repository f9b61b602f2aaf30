"""How well held-out text is predicted: perplexity by domain, loss by position, and what a long context is worth."""

from __future__ import annotations

import itertools
import math
import sys
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


def sample_windows(stores: Mapping[str, TokenStore], context: int, count: int) -> list[np.ndarray]:
    """The first `context` tokens of at most `count` documents that are as long; domains take turns."""
    by_domain = [
        [store.row(row).segments[0][:context] for row in np.flatnonzero(store.row_lengths >= context)[:count].tolist()]
        for store in stores.values()
    ]
    turns = itertools.zip_longest(*by_domain)
    return [window for turn in turns for window in turn if window is not None][:count]


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats; infinite where no float holds it."""
    return math.exp(loss) if not loss > math.log(sys.float_info.max) else math.inf


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
    gain_error: float  # standard error of the gain over the windows; NaN of a single one

    @property
    def gain(self) -> float:
        """What the longer context saves."""
        return self.short - self.full


def late_loss(
    model: Transformer, windows: Sequence[np.ndarray], losses: Tensor, short_context: int, max_tokens: int
) -> LateLoss:
    """The tokens of each window's second half, once with all of the window before them, once with a short context.

    The second time they are scored in pieces of a quarter of a short context, each at the end of one: a token has from
    three quarters of it to the whole before it. One piece a token would cost many times as much for as good as nothing.

    Args:
        windows: of equal length, longer than `short_context`.
        losses: of these windows, from `losses_by_position`: [windows, L - 1].
        short_context: tokens.
    """
    length, piece = len(windows[0]), max(short_context // 4, 1)
    ends = range(length, max(length // 2, short_context - 1), -piece)
    cut = [window[end - short_context : end] for window in windows for end in ends]
    short = losses_by_position(model, cut, max_tokens)[:, -piece:]
    full = losses[:, -piece * len(ends) :].double().mean(1)  # [windows], as short
    short = short.unflatten(0, (len(windows), -1)).double().mean((1, 2))
    error = (short - full).std() / len(windows) ** 0.5
    return LateLoss(full.mean().item(), short.mean().item(), error.item())


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
