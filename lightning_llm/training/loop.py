"""Lightning's Trainer, set up the one way that all training stages use: one loader item is one optimizer step."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Sequence

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset

from lightning_llm.data.packing import StageData, Window
from lightning_llm.objectives.base import Objective
from lightning_llm.stages.config import ComputeConfig
from lightning_llm.training.rollout import Rollouts

for part in ("pytorch", "fabric"):
    logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)  # works after the import only


class Windows(Dataset[Window]):
    """A rank's share of each step of a stage. It has a length: otherwise Lightning draws an item ahead."""

    def __init__(self, data: StageData | Rollouts, rank: int, world_size: int, micro_batch_tokens: int):
        self.data, self.rank, self.world_size, self.micro_batch_tokens = data, rank, world_size, micro_batch_tokens

    def __len__(self) -> int:
        return self.data.steps

    def __getitem__(self, step: int) -> Window:
        return self.data.window(
            step, rank=self.rank, world_size=self.world_size, micro_batch_tokens=self.micro_batch_tokens
        )


class DiesOfSigterm(Callback):
    """Lightning answers SIGTERM with a broadcast from inside the handler, which hangs a rank that is in a collective.

    Ranks save nothing when they are told to end, so they may end at once. The trainer restores the handler.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Objective) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the signal its default back."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fit(
    objective: Objective,
    data: StageData | Rollouts,
    compute: ComputeConfig,
    *,
    precision: str,
    callbacks: Sequence[Callback] = (),
    rank: int = 0,
) -> None:
    """Train `objective` on every window of `data`.

    Args:
        precision: "fp32", or "bf16": products in bf16, weights and optimizer state in fp32.
        rank: of this process, where the elastic launcher started several (`stages/worker.py`).

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came; the weights are those of the last finished step.
    """
    if compute.devices > 1:
        backend = "nccl" if compute.accelerator == "gpu" else "gloo"
        strategy = DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)
        environment = TorchElasticEnvironment()
        callbacks = [*callbacks, DiesOfSigterm()]
    else:
        strategy, environment = "auto", LightningEnvironment()  # named, so that a SLURM job's variables mean nothing
    interrupt_handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        # windows are made in this process on purpose: their place in the data is a counter, and they are cheap
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # of Lightning's, under torch 2.13
        trainer = Trainer(
            accelerator=compute.accelerator,
            devices=compute.devices,
            strategy=strategy,
            plugins=[environment],
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            max_epochs=1,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        windows = Windows(data, rank, compute.devices, compute.micro_batch_tokens)
        loader = DataLoader(windows, batch_size=None, collate_fn=lambda window: window)
        try:
            trainer.fit(objective, loader)
        except SystemExit:  # what Lightning makes of SIGTERM and of Ctrl-C, after which it leaves SIGINT ignored
            signal.signal(signal.SIGINT, interrupt_handler)
            raise KeyboardInterrupt from None
