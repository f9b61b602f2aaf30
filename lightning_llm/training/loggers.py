"""TensorBoard, Weights & Biases and MLflow, through Lightning's own loggers: the journal's lines, once more.

A stage is a run of its own there, named <run>/<stage>, with the stage's settings as hyper-parameters. The step is the
optimizer's; `tokens` is among the figures.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_llm.settings import UserError
from lightning_llm.training.config import LoggedRun, LoggerConfig, MLflowConfig, TensorBoardConfig, WandbConfig

if TYPE_CHECKING:  # the runner asks what is installed before anything heavy is imported
    from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


def refuse_absent(loggers: Iterable[LoggerConfig]) -> None:
    """Before anything trains.

    Raises:
        UserError: a chosen logger's package is not installed.
    """
    for config in loggers:
        absent = [name for name in config.packages if find_spec(name) is None]
        if absent:
            what = f"needs {' and '.join(absent)}, not installed here"
            raise UserError(f"logger={config.name}", what, "pip install 'lightning-llm[loggers]'")


@contextmanager
def stage_loggers(logged: LoggedRun | None, stage: str, settings: Any) -> Iterator[list[Logger]]:
    """The loggers of one stage, told its settings; at the end they are told how it ended.

    Args:
        logged: none: no loggers.
        settings: the stage's dataclass.
    """
    loggers: list[Logger] = [] if logged is None else [config.build(logged, stage) for config in logged.loggers]
    for logger in loggers:
        logger.log_hyperparams(flat(dataclasses.asdict(settings)))
    status = "failed"
    try:
        yield loggers
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)
            finish = getattr(getattr(logger, "experiment", None), "finish", None)
            if finish:  # Lightning leaves a run of W&B open: the next stage would go on in it
                finish(exit_code=int(status == "failed"))


def log_line(loggers: Sequence[Logger], line: Mapping[str, Any]) -> None:
    """A line of metrics.jsonl; what is no number is left out."""
    figures = {
        name: float(value)
        for name, value in flat(line).items()
        if isinstance(value, int | float) and math.isfinite(value) and name != "step"
    }
    for logger in loggers:
        logger.log_metrics(figures, step=line["step"])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined with "/" and in letters that all loggers allow; lists as JSON, no None.

    >>> flat({"lr": {"peak": 0.1, "final": None}, "betas": [0.9, 0.95]})
    {'lr/peak': 0.1, 'betas': '[0.9, 0.95]'}
    """
    result: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + re.sub(r"[^\w/. -]", "_", str(name))
        if isinstance(value, Mapping):
            result |= flat(value, f"{key}/")
        elif value is not None:
            result[key] = json.dumps(value) if isinstance(value, list | tuple) else value
    return result


def build_tensorboard(config: TensorBoardConfig, logged: LoggedRun, stage: str) -> TensorBoardLogger:
    """TensorBoard's logger: event files in <directory>/<recipe>/<run>/<stage>."""
    from lightning.pytorch.loggers import TensorBoardLogger

    place = Path(config.directory).expanduser() / logged.recipe / logged.run
    return TensorBoardLogger(place, name=stage, version="", default_hp_metric=False)


def build_wandb(config: WandbConfig, logged: LoggedRun, stage: str) -> WandbLogger:
    """Weights & Biases' logger: one run a stage, grouped by our run; offline unless the setting says otherwise.

    Needs the package `wandb`; files are below the setting's directory.
    """
    import wandb  # pyright: ignore[reportMissingImports]
    from lightning.pytorch.loggers import WandbLogger

    place = Path(config.directory).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    run = wandb.init(  # by ourselves: Lightning names a setting that W&B warns of
        name=f"{logged.run}/{stage}",
        dir=place,
        project=config.project or logged.recipe,
        entity=config.entity,
        group=logged.run,
        mode="offline" if config.offline else "online",
        settings=wandb.Settings(console="off", silent=config.offline),
    )
    run.define_metric("*", step_metric="trainer/global_step")  # what Lightning calls the step
    return WandbLogger(experiment=run)


def build_mlflow(config: MLflowConfig, logged: LoggedRun, stage: str) -> MLFlowLogger:
    """MLflow's logger: one run a stage, in the experiment of the setting or of the recipe's name.

    Needs the package `mlflow`; the folder of an sqlite database is made.
    """
    import mlflow  # noqa: F401  # pyright: ignore[reportMissingImports]  # sets up its logging, quietened below
    from lightning.pytorch.loggers import MLFlowLogger

    for part in ("mlflow", "alembic"):
        logging.getLogger(part).setLevel(logging.WARNING)
    scheme, _, place = config.uri.partition(":///")
    if scheme == "sqlite":
        path = Path(place).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(config, uri=f"sqlite:///{path}")
    return MLFlowLogger(
        config.experiment or logged.recipe,
        run_name=f"{logged.run}/{stage}",
        tracking_uri=config.uri,
        tags={"recipe": logged.recipe, "run": logged.run, "stage": stage},
    )
