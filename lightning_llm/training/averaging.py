"""A mean of the weights that a stage goes through, kept beside them: its artifact's model, if the stage says so."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_llm.data.packing import Window
from lightning_llm.merging.averaging import follow
from lightning_llm.models import Transformer
from lightning_llm.objectives.base import Objective
from lightning_llm.training.config import AveragingConfig


def share_of_newest(config: AveragingConfig, count: int) -> float:
    """How far an average moves towards the last of `count` checkpoints: average + share (newest - average).

    polyak: 1 / n, so that it is the mean of all of them (Polyak & Juditsky 1992; Llama 3, arXiv 2407.21783, section
    3.4.3). ema: 1 - decay, and all of the way for the first.
    """
    return 1 / count if config.method == "polyak" or count == 1 else 1 - config.decay


class WeightAverage(Callback):
    """Follows the weights in fp32. After the last step the model holds the average, `last` what it was trained to."""

    def __init__(self, config: AveragingConfig, total_tokens: int, steps: int):
        """
        Args:
            total_tokens, steps: of the stage.
        """
        self.config, self.total_tokens, self.steps = config, total_tokens, steps
        self.count = 0  # checkpoints in the average
        self.average: dict[str, Tensor] = {}  # parameter -> fp32, where the model is
        self.last: dict[str, Tensor] = {}  # the same of the last step, on the CPU, once the model holds the average

    def on_train_batch_end(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, trainer: Trainer, pl_module: Objective, outputs: object, batch: Window, batch_idx: int
    ) -> None:
        """Take the step's weights in, if they are a checkpoint of the average."""
        if self.is_taken(batch.progress.steps, batch.progress.tokens):
            self.take(pl_module.model)

    def on_train_end(self, trainer: Trainer, pl_module: Objective) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Put the average into the model; its last weights are set aside."""
        parameters = dict(pl_module.model.named_parameters())
        self.last = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        restore(pl_module.model, self.average)

    def is_taken(self, step: int, tokens: float) -> bool:
        """Whether the weights after a step count: every so many steps, counted back from the last, which always does.

        Args:
            step, tokens: of the stage, this step among them.
        """
        return tokens > self.config.from_share * self.total_tokens and (self.steps - step) % self.config.every == 0

    @torch.no_grad()
    def take(self, model: Transformer) -> None:
        """One more checkpoint."""
        self.count += 1
        newest = dict(model.named_parameters())
        if not self.average:
            self.average = {name: torch.empty_like(p, dtype=torch.float32).copy_(p) for name, p in newest.items()}
        follow(self.average, newest, share_of_newest(self.config, self.count))


@torch.no_grad()
def restore(model: Transformer, weights: dict[str, Tensor]) -> None:
    """Give every parameter of a model the values of its name."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
