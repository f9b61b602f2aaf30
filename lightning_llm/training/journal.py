"""What a training stage writes down: metrics.jsonl in about 200 lines, validation losses, the line on the console."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.packing import StageData, Window
from lightning_llm.objectives.base import Objective
from lightning_llm.optimization.window import Sums, Totals
from lightning_llm.training.console import StageConsole
from lightning_llm.training.loggers import log_line
from lightning_llm.training.rollout import Rollouts

LINES = 200  # of training metrics in a stage
Validate = Callable[[Objective, int, int], Totals]  # objective, rank, ranks -> this rank's share of the sums


def held_out_loss(batches: Callable[[], Iterable[tuple[str, SegmentBatch]]]) -> Validate:
    """Held-out loss of every source, and over all of them, per unit of the objective.

    Args:
        batches: makes (source, batch) of held-out rows, the same at every validation of a stage.
    """

    def validate(objective: Objective, rank: int, ranks: int) -> Totals:
        totals = Totals()
        for index, (source, batch) in enumerate(batches()):
            if index % ranks == rank:
                part = objective.held_out_loss(batch.to(objective.device))
                totals.add_loss(part, prefix="validation/")
                totals.add(f"validation/{source}", part.loss, part.count)
        return totals

    return validate


class Journal(Callback):
    """Rides along in the trainer. Only rank 0 writes; sums are added up over all ranks first.

    A line's figures are means over the steps since the line before; its rate and time are of that interval too and
    leave validation out.
    """

    def __init__(
        self,
        path: Path,
        data: StageData | Rollouts,
        console: StageConsole,
        *,
        total_tokens: int,
        evaluate_every: float | None,
        validate: Validate,
        training_flops: Callable[[list[tuple[int, int]]], float],
        flops_per_second: float,
    ):
        """
        Args:
            evaluate_every: tokens between validation losses; none: a tenth of the total.
            validate: what is measured on held-out rows.
            training_flops: of segments, given as (tokens, tokens of the prefix).
            flops_per_second: of all devices together, for the utilisation.
        """
        self.path, self.data, self.console, self.total_tokens = path, data, console, total_tokens
        self.evaluate_every = evaluate_every or max(total_tokens / 10, 1)
        self.validate = validate
        self.training_flops, self.flops_per_second = training_flops, flops_per_second
        self.loggers: Sequence[Logger] = ()  # where every line goes as well
        self.every = math.ceil(data.steps / LINES)
        self.last: dict[str, float] = {}  # the newest value of every figure, validation losses among them
        self.nominal = 0  # tokens after the step before
        self.tokens = 0  # consumed in fact
        self.flops = 0.0
        self.seconds = 0.0  # of training, without validation
        self.validation_seconds = 0.0
        self.measures_average = False  # of the weights, which is in the model when training ends

    def on_train_start(self, trainer: Trainer, pl_module: Objective) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A new file, whatever an interrupted run has left; validation of the weights as they came."""
        if trainer.is_global_zero:
            self.path.unlink(missing_ok=True)
        self._timed_validation(trainer, pl_module, step=0, tokens=0)
        self._begin_interval(pl_module)

    def on_train_batch_end(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, trainer: Trainer, pl_module: Objective, outputs: object, batch: Window, batch_idx: int
    ) -> None:
        """Count a step's tokens and FLOPs; write a line and validate where it is time."""
        window, steps = batch, batch.progress.steps
        consumed = sum(window.consumed.values())
        self.tokens += consumed
        self.interval_tokens += consumed
        flops = self.training_flops(window.segments) + window.flops
        self.flops += flops
        self.interval_flops += flops
        if steps % self.every == 0 or steps == self.data.steps:
            self._write_line(trainer, pl_module, window)
        if self._is_due(window):
            self.interval_began += self._timed_validation(trainer, pl_module, step=steps, tokens=window.progress.tokens)
        self.nominal = window.progress.tokens
        shown = {name.removesuffix("/mean"): self.last[name] for name in ("loss", "reward/mean") if name in self.last}
        self.console.update(window.progress.tokens, self.total_tokens, "tok", **shown)

    def on_train_end(self, trainer: Trainer, pl_module: Objective) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Held-out rows once more, under averaged/*, where the model is now an average of what it was."""
        if self.measures_average:
            steps, tokens = self.data.steps, self.total_tokens
            self._timed_validation(trainer, pl_module, step=steps, tokens=tokens, called="averaged/")

    def _begin_interval(self, objective: Objective) -> None:
        objective.totals = Totals()
        self.interval_tokens, self.interval_flops, self.interval_began = 0, 0.0, time.perf_counter()

    def _is_due(self, window: Window) -> bool:
        crossed = window.progress.tokens // self.evaluate_every > self.nominal // self.evaluate_every
        return crossed or window.progress.steps == self.data.steps

    def _write_line(self, trainer: Trainer, objective: Objective, window: Window) -> None:
        means = objective.totals.means(_gather if trainer.world_size > 1 else None)
        if "loss" not in means:
            return  # steps smaller than a document may count nothing: the interval goes on
        for name in ("loss", "grad_norm"):
            if not math.isfinite(means[name]):
                what = f"{name} became {means[name]} within the {self.every} steps up to {window.progress.steps}"
                raise FloatingPointError(f"{what}; lower lr.peak, or look at the data of metrics.jsonl's last lines")
        seconds = time.perf_counter() - self.interval_began
        self.seconds += seconds
        figures = {
            "loss": means.pop("loss"),
            "lr": objective.learning_rate,
            "grad_norm": means.pop("grad_norm"),
            "tokens_per_second": self.interval_tokens / seconds,
            "flops_utilisation": self.interval_flops / seconds / self.flops_per_second,
        }
        self.last |= figures | means
        self._append(
            trainer,
            {
                "step": window.progress.steps,
                "tokens": window.progress.tokens,
                "samples": window.progress.samples,
                **figures,
                "context": window.context,
                "consumed": self.data.ledger(window.progress.steps),
                **means,
            },
        )
        self._begin_interval(objective)

    def _timed_validation(
        self, trainer: Trainer, objective: Objective, *, step: int, tokens: int, called: str = "validation/"
    ) -> float:
        """Validate; seconds that it took."""
        before = time.perf_counter()
        self._validate(trainer, objective, step=step, tokens=tokens, called=called)
        seconds = time.perf_counter() - before
        self.validation_seconds += seconds
        return seconds

    @torch.no_grad()
    def _validate(self, trainer: Trainer, objective: Objective, *, step: int, tokens: int, called: str) -> None:
        """Write down what is found on held-out rows; ranks share them.

        Args:
            called: what figures begin with, instead of validation/.
        """
        objective.eval()
        with trainer.precision_plugin.val_step_context():
            totals = self.validate(objective, trainer.global_rank, trainer.world_size)
        objective.train()
        means = totals.means(_gather if trainer.world_size > 1 else None)
        means = {name.replace("validation/", called, 1): value for name, value in means.items()}
        if means:
            self.last |= means
            self._append(trainer, {"step": step, "tokens": tokens, **means})

    def _append(self, trainer: Trainer, line: dict) -> None:
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                finite = {
                    name: None if value != value or value in (math.inf, -math.inf) else value
                    for name, value in line.items()
                }
                file.write(json.dumps(finite, allow_nan=False) + "\n")  # JSON has no NaN
            log_line(self.loggers, line)


def _gather(own: Sums) -> Sequence[Sums]:
    everyone: list[Sums] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return everyone
