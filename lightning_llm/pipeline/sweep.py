"""A multirun: all jobs are checked before the first trains, and one that fails does not stop the others."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lightning_llm.pipeline.composition import compose_tree
from lightning_llm.pipeline.plan import plan
from lightning_llm.pipeline.reader import build_settings
from lightning_llm.pipeline.recipe import build_recipe
from lightning_llm.pipeline.runner import check_run
from lightning_llm.settings import UserError


def use_checked_sweeper() -> None:
    """Take the place of Hydra's basic sweeper in this process; a sweeper that the user chooses stays what it is."""
    Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_sweeper.BasicSweeper"] = CheckedSweeper


class SweepFailed(Exception):
    """Some jobs of a multirun failed; they have been listed."""

    def __init__(self, is_users: bool):
        self.is_users = is_users  # all failures were the user's mistakes
        super().__init__(is_users)


@dataclass
class Job:
    """One job of a multirun."""

    label: str  # its place and its overrides
    overrides: list[str]
    error: BaseException | None = None
    folder: str | None = None  # of its run


class CheckedSweeper(Sweeper):
    """The grid over all values that are given, as Hydra's own, for any of its launchers."""

    config: DictConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    launcher: Launcher  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None):
        self.max_batch_size, self.params = max_batch_size, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands to a sweeper before it sweeps, and make its launcher."""
        self.config, self.loader = config, hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Job]:
        """Run the grid.

        Raises:
            SweepFailed: a job failed; the others have been run.
        """
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # Hydra loads it anew when it starts

        words = [f"{key}={value}" for key, value in self.params.items()] + arguments
        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(words)
        try:
            grid = BasicSweeper.split_arguments(overrides, None)[0]
        except (ValueError, TypeError) as error:  # as of range(1,3,0)
            raise UserError(
                "command line", f"the sweep cannot be read: {error}", "Write seed=0,1 or range(0,2)"
            ) from error
        if not grid:
            raise UserError("command line", "the sweep has no jobs", "Give each key a value, as seed=0,1")
        jobs = [Job(f"[{i}/{len(grid)}] {' '.join(one)}", list(one)) for i, one in enumerate(grid, start=1)]
        for job in jobs:
            self._check(job)
        good = [job for job in jobs if job.error is None]
        for job in jobs if good else ():  # otherwise the list at the end is all there is
            if job.error is not None:
                _say_failed(job)
        size = self.max_batch_size or len(good) or 1
        for start in range(0, len(good), size):
            self._launch(good[start : start + size], start)
        return self._conclude(jobs)

    def _check(self, job: Job) -> None:
        verb = self.config.hydra.job.config_name
        try:
            composition = compose_tree(verb, job.overrides, loader=self.loader)  # pyright: ignore[reportArgumentType]
            settings = build_settings(composition)
            if composition.recipe is None:  # a verb that takes none
                return
            recipe, chosen = build_recipe(composition, settings), {"until": settings.until, "only": settings.only}
            if verb == "run":
                check_run(recipe, **chosen, force=settings.force)
            else:
                plan(recipe).selected(**chosen)
        except UserError as error:
            job.error = error

    def _launch(self, jobs: Sequence[Job], first: int) -> None:
        results = self.launcher.launch([job.overrides for job in jobs], initial_job_idx=first)
        for job, result in zip(jobs, results, strict=True):
            if result.status == JobStatus.COMPLETED:
                job.folder = result.return_value
                continue
            job.error = error = result._return_value  # its property would print a line and raise
            if not isinstance(error, UserError):
                traceback.print_exception(error)
            _say_failed(job)

    def _conclude(self, jobs: list[Job]) -> list[Job]:
        """List how each job ended."""
        for job in jobs:
            if job.error is None:
                print(f"{job.label}  {job.folder or 'done'}", flush=True)
            else:
                _say_failed(job)
        failures = [job.error for job in jobs if job.error is not None]
        if failures:
            raise SweepFailed(all(isinstance(error, UserError) for error in failures))
        return jobs


def _say_failed(job: Job) -> None:
    print(f"error: {job.label}: {job.error}", file=sys.stderr, flush=True)
