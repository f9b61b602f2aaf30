"""What all objectives share: a model, the step around `loss`, the sums for logging, and frozen models kept apart."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.packing import Window
from lightning_llm.losses.load_balance import load_balancing_loss, load_imbalance
from lightning_llm.models import Transformer
from lightning_llm.objectives.config import ObjectiveConfig
from lightning_llm.optimization.config import LearningRateConfig, OptimizerConfig
from lightning_llm.optimization.online_merging import OnlineMerging
from lightning_llm.optimization.window import LossSum, Totals, optimizer_step
from lightning_llm.schedules import learning_rate

Model = TypeVar("Model", bound=nn.Module)


class Frozen(Generic[Model]):
    """A model that only answers: reference, teacher, reward model.

    It is no `nn.Module`, so the module that holds it neither saves, shards, trains nor moves it.
    """

    def __init__(self, model: Model):
        self.model: Model = model.eval().requires_grad_(False)

    def on(self, device: torch.device) -> Model:
        """The model, moved there the first time."""
        return self.model.to(device)


class Objective(LightningModule):
    """A loss in training. A subclass says what a unit is and what a micro-batch's units cost in sum: `loss(batch)`.

    Lightning's trainer hands one `Window` at a time to `training_step`, which is one optimizer step. What is logged
    gathers in `totals`; whoever writes it down (`training/journal.py`) takes it and starts anew.
    """

    unit: ClassVar[str] = "target_tokens"  # the field of `Window` that counts the units

    def __init__(self, config: ObjectiveConfig, model: Transformer):
        super().__init__()
        self.automatic_optimization = False  # one loader item is one step; optimization/window.py makes it
        self.config = config
        self.model = model
        self.totals = Totals()
        self.learning_rate = 0.0  # of the last step
        self.online_merging: OnlineMerging | None = None  # of each step with what a reference has learnt

    def loss(self, batch: SegmentBatch) -> LossSum:
        """Sum of the loss over the batch's units, their count, and sums of what the field logs beside it."""
        raise NotImplementedError

    def held_out_loss(self, batch: SegmentBatch) -> LossSum:
        """What validation measures: the loss, where that is the same for whoever is compared."""
        return self.loss(batch)

    def trained_loss(self, batch: SegmentBatch) -> LossSum:
        """The loss, and what the routers of a mixture of experts pay for sending tokens unevenly.

        Logs `router/aux_loss` (before its weight) and `router/imbalance`, means over tokens.
        """
        part = self.loss(batch)
        routed = self.model.take_routed()
        if not routed:
            return part
        tokens = routed[0].tokens if part.count else 0  # a batch that only fills up counts nothing
        load = torch.stack([layer.load for layer in routed])  # [L, E]
        balance = load_balancing_loss(torch.stack([layer.probability for layer in routed]), load, routed[0].tokens)
        metrics = {
            "router/aux_loss": (balance.detach() * tokens, tokens),
            "router/imbalance": (load_imbalance(load) * tokens, tokens),
        }
        weight = self.model.config.router_aux_loss_coef * tokens
        return replace(part, per_token=balance * weight, metrics={**part.metrics, **metrics})

    def optimised_by(self, optimizer: OptimizerConfig, schedule: LearningRateConfig, total_tokens: int) -> Objective:
        """Set what `fit` needs beyond the loss; returns the objective itself."""
        self.optimizer_config, self.schedule, self.total_tokens = optimizer, schedule, total_tokens
        return self

    def frozen(self, model: Model | None) -> Frozen[Model] | None:
        """A holder for a model that must not be a child of this module."""
        return None if model is None else Frozen(model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the settings, over the trained model alone, its steps merged if they are to be."""
        optimizer = self.optimizer_config.build(self.model)
        return optimizer if self.online_merging is None else self.online_merging.around(optimizer, self.model)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The window as it is."""
        return batch  # `training_step` moves one micro-batch at a time

    def training_step(self, window: Window, index: int) -> None:
        """One optimizer step over a whole window, with the learning rate at its last token.

        So the first step of a warm-up moves something already, and the last of a schedule that ends at 0 nothing.
        """
        wrapped = self.trainer.strategy.model
        self.learning_rate = learning_rate(self.schedule, window.progress.tokens, self.total_tokens)
        step = optimizer_step(
            lambda batch: self.trained_loss(batch.to(self.device)),
            window.mine,
            self.optimizers(),  # pyright: ignore[reportArgumentType]  # Lightning's wrapper: stepping it counts the step
            units=getattr(window, self.unit),
            tokens=sum(window.consumed.values()),
            learning_rate=self.learning_rate,
            schedule=self.learning_rate / self.schedule.peak if self.schedule.peak else 0.0,
            clip_norm=self.optimizer_config.clip_norm,
            world_size=self.trainer.world_size,
            backward=self.manual_backward,
            no_sync=wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else nullcontext,
        )
        self.totals.merge(step)
        for name, (total, count) in window.figures.items():
            self.totals.add(name, total, count)


def token_logps(model: Transformer, batch: SegmentBatch) -> Tensor:
    """Log-likelihood of every target that counts, in nats, 0 for the others [N]; each may get its own gradient."""
    hidden = model(batch)  # [T, d]
    counted = batch.target_mask.nonzero().squeeze(1)
    logps = model.log_likelihood(hidden[batch.predictors[counted]], batch.target_ids[counted])
    return logps.new_zeros(len(batch.target_ids)).index_copy(0, counted, logps)
