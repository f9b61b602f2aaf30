"""Settings of the loggers: where figures of training go besides metrics.jsonl. None of it enters a key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lightning_llm.settings import Buildable, option


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
