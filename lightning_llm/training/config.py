"""Settings of training on a policy's own responses, of averages of weights, and of loggers (these enter no key)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lightning_llm.generation.config import SamplingConfig
from lightning_llm.settings import Buildable, came_later, option, refuse_below


@dataclass
class RolloutConfig:
    """How a stage learns from what its own policy says: how much is drawn at once, and how long that is used."""

    prompts: int = 128  # of one optimizer step
    per_prompt: int = 4  # responses to each
    max_new_tokens: int = 512  # a response is cut after so many
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    steps: int = 1  # optimizer steps whose responses are drawn together, before the first of them
    epochs: int = 1  # passes over what was drawn
    max_staleness: int = 7  # optimizer steps between the policy that drew a response and the one that learns from it
    reference: str = "fixed"  # fixed (the model that the stage starts from) | ema (an average that follows the policy)
    ema_decay: float = 0.99  # of that average, per optimizer step
    held_out: int = 64  # held-out prompts whose mean reward is followed; 0: none
    round: int = came_later(0)  # prompts of so many stages like this one are passed over; unrolling rounds sets it

    def __post_init__(self):
        refuse_below(1, self, "prompts", "per_prompt", "max_new_tokens", "steps", "epochs")
        refuse_below(0, self, "max_staleness", "held_out", "round")
        if self.per_prompt > 1 and (sure := self.sampling.sure_by):
            raise ValueError(f"{sure}: all responses to a prompt would be the same")
        if self.reference not in ("fixed", "ema"):
            raise ValueError(f"reference is fixed or ema, is {self.reference!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay lies in [0, 1), is {self.ema_decay:g}")
        if (staleness := self.steps * self.epochs - 1) > self.max_staleness:
            raise ValueError(
                f"max_staleness is {self.max_staleness}, and {self.steps} steps of {self.epochs} epochs after each "
                f"drawing learn from responses that are up to {staleness} steps old"
            )


AVERAGES = ("none", "polyak", "ema")


@dataclass
class AveragingConfig:
    """A mean of the weights that a stage goes through, which is then its model (training/averaging.py).

    Llama 3 averages the checkpoints of its annealing (3.4.3).
    """

    method: str = "none"  # none | polyak (the mean of all checkpoints) | ema (the newest count most)
    from_share: float = 0.0  # of the stage's tokens, that pass before the first checkpoint is taken
    every: int = 1  # optimizer steps between two checkpoints
    decay: float = 0.99  # ema: what is left of the average at each of them

    def __post_init__(self):
        if self.method not in AVERAGES:
            raise ValueError(f"method is one of {', '.join(AVERAGES)}, is {self.method!r}")
        if not 0 <= self.from_share < 1:
            raise ValueError(f"from_share lies in [0, 1), is {self.from_share:g}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay lies in [0, 1), is {self.decay:g}")
        refuse_below(1, self, "every")

    @property
    def is_on(self) -> bool:
        """Whether anything is averaged."""
        return self.method != "none"


@dataclass
class LoggerConfig(Buildable):
    """What all loggers have in common."""

    name: str = "???"
    packages: ClassVar[tuple[str, ...]] = ()  # what it imports beyond our own requirements


@option("logger", "tensorboard")
@dataclass
class TensorBoardConfig(LoggerConfig):
    """Event files for TensorBoard, in <directory>/<recipe>/<run>/<stage>."""

    implementation: ClassVar[str] = "lightning_llm.training.loggers:build_tensorboard"
    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)
    name: str = "tensorboard"
    directory: str = "logs/tensorboard"


@option("logger", "wandb")
@dataclass
class WandbConfig(LoggerConfig):
    """A run of Weights & Biases for each stage, grouped by ours; offline until `wandb sync <directory>/wandb/*`."""

    implementation: ClassVar[str] = "lightning_llm.training.loggers:build_wandb"
    packages: ClassVar[tuple[str, ...]] = ("wandb",)
    name: str = "wandb"
    directory: str = "logs"
    project: str | None = None  # none: the recipe's name
    entity: str | None = None  # none: the user's own
    offline: bool = True


@option("logger", "mlflow")
@dataclass
class MLflowConfig(LoggerConfig):
    """A run of MLflow for each stage, in a database file or on a server."""

    implementation: ClassVar[str] = "lightning_llm.training.loggers:build_mlflow"
    packages: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")
    name: str = "mlflow"
    uri: str = "sqlite:///logs/mlflow.db"
    experiment: str | None = None  # none: the recipe's name


@dataclass
class LoggedRun:
    """What a stage's loggers are told of the run that it belongs to."""

    recipe: str
    run: str  # the name of the run's folder
    loggers: list[LoggerConfig] = field(default_factory=list)
