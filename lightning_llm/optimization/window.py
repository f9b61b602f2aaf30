"""The one optimizer step: gradients of a window, divided once, clipped, applied. Nothing else divides a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_llm.batch import SegmentBatch

Count = Tensor | int | float
Sums = dict[str, tuple[float, float]]  # name -> (sum, count), on the host


@dataclass
class LossSum:
    """What an objective makes of one micro-batch: sums over its units, never means."""

    loss: Tensor  # [], summed over units (target tokens, pairs), differentiable
    count: Count  # units in it
    metrics: Mapping[str, tuple[Tensor, Count]] = field(default_factory=dict)  # name -> (sum, what it is a sum over)
    per_token: Tensor | None = None  # [], added loss of the batch's tokens as such, summed over them, differentiable


class Totals:
    """Named sums and their counts over micro-batches and steps. They stay on the device until somebody reads them."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Count]] = {}

    def add(self, name: str, total: Tensor | float, count: Count) -> None:
        """One more sum over `count` units under a name."""
        before, units = self._sums.get(name, (0.0, 0))
        self._sums[name] = before + total, units + count

    def add_loss(self, part: LossSum, prefix: str = "") -> None:
        """The loss and the metrics of one micro-batch."""
        self.add(f"{prefix}loss", part.loss.detach(), part.count)
        for name, (total, count) in part.metrics.items():
            self.add(f"{prefix}{name}", total, count)

    def merge(self, other: Totals) -> None:
        """All sums of another, added to those here."""
        for name, (total, count) in other._sums.items():
            self.add(name, total, count)

    def means(self, gather: Callable[[Sums], Sequence[Sums]] | None = None) -> dict[str, float]:
        """sum / count of every name of which something was counted. This is where the host waits for the device.

        Args:
            gather: hands every rank's sums to every rank; the means are then over all of them.
        """
        own = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
        together: Sums = {}
        for part in [own] if gather is None else gather(own):
            for name, (total, count) in part.items():
                before, units = together.get(name, (0.0, 0.0))
                together[name] = before + total, units + count
        return {name: total / count for name, (total, count) in together.items() if count}


def optimizer_step(
    loss: Callable[[SegmentBatch], LossSum],
    micro_batches: Sequence[SegmentBatch],
    optimizer: torch.optim.Optimizer,
    *,
    units: int,
    tokens: int = 0,
    learning_rate: float,
    schedule: float = 1.0,
    clip_norm: float = 0.0,
    world_size: int = 1,
    backward: Callable[[Tensor], None] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> Totals:
    """One update with the mean over a whole window of units, however they are split into micro-batches and over ranks.

    With n units in the window, w ranks and gradients that the strategy averages over ranks, each micro-batch's summed
    loss goes backward times w / n. A micro-batch without units adds zero. What it adds per token goes backward times
    w / t, with the window's t tokens. If that is not additive over tokens (a mixture of experts' load balance is a
    product of two means), it is the mean over the micro-batches, weighted by their tokens, and depends on the split.

    Args:
        loss: an objective's sum over a micro-batch.
        micro_batches: this rank's; every rank has equally many.
        units: n, over all micro-batches of all ranks; 0: the weights stay as they are.
        tokens: t, over all micro-batches of all ranks; needed where the loss adds something per token.
        learning_rate: of this step; a parameter group's own `lr_scale` multiplies it.
        schedule: it as a share of its peak, for optimizers whose decay does not follow the rate itself.
        clip_norm: upper bound of the norm of the whole gradient; 0: none.
        backward, no_sync: the strategy's own. Gradients are exchanged in the last micro-batch alone.

    Returns:
        `loss` and the objective's metrics summed over this rank's micro-batches, and `grad_norm` before clipping.
    """
    totals = Totals()
    optimizer.zero_grad(set_to_none=True)
    for index, batch in enumerate(micro_batches):
        with nullcontext() if index == len(micro_batches) - 1 else no_sync():
            part = loss(batch)
            total = part.loss * (world_size / max(units, 1))
            if part.per_token is not None:
                total = total + part.per_token * (world_size / max(tokens, 1))
            backward(total)
        totals.add_loss(part)
    if not units:  # decay and momentum would move the weights without a word of the data
        return totals
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
        group["schedule"] = schedule
    optimizer.step()
    totals.add("grad_norm", norm, 1)
    return totals
