"""A rank's entry: several processes train one stage, started by torch's elastic launcher from inside the run.

The run composes once and hands each rank a JSON file: a rank never sees Hydra or the command line.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import pkgutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_llm.settings import UserError

if TYPE_CHECKING:
    from lightning_llm.stages.context import StageContext, StageResult
    from lightning_llm.training.console import StageConsole


def launch(context: StageContext) -> StageResult:
    """Train a stage in `compute.devices` processes on this machine and wait for them.

    Raises:
        UserError: as a rank found it.
        KeyboardInterrupt: SIGINT or SIGTERM came and was passed on to the ranks.
        RuntimeError: a rank failed; names it and its error.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from lightning_llm.stages.context import StageResult

    count = context.compute.devices
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=context.name,
        max_restarts=0,
        monitor_interval=0.1,
    )
    with tempfile.TemporaryDirectory(prefix="lightning-llm-") as folder, kept_signal_handlers():
        exchange = Path(folder)
        (exchange / "stage.json").write_text(json.dumps(plain(dataclasses.replace(context, console=None))))
        with followed(exchange / "progress.jsonl", context.console):
            try:
                elastic_launch(config, sys.executable)("-m", "lightning_llm.stages.worker", str(exchange))
            except SignalException:
                raise KeyboardInterrupt from None
            except ChildFailedError as error:
                for user_error in exchange.glob("user_error.*.json"):
                    raise UserError(*json.loads(user_error.read_text())) from None
                rank, failure = error.get_first_failure()
                raise RuntimeError(f"rank {rank} of {count} failed: {failure.message}") from error
        return StageResult(**json.loads((exchange / "result.json").read_text()))


def main() -> None:
    """One rank; the folder with its orders is the only argument."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # die with the run, even if that is killed outright
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback: the run says what happened
    exchange = Path(sys.argv[1])
    context: StageContext = from_plain(json.loads((exchange / "stage.json").read_text()))
    each = max((os.cpu_count() or 1) // context.compute.devices, 1)
    context.compute.threads = context.compute.threads or each
    os.environ["OMP_NUM_THREADS"] = str(context.compute.threads)  # before torch is there; by default each takes all
    rank = int(os.environ["RANK"])
    context.console = ProgressFile(exchange / "progress.jsonl" if rank == 0 else Path(os.devnull))  # pyright: ignore[reportAttributeAccessIssue]

    from torch.distributed.elastic.multiprocessing.errors import record

    record(work)(context, rank, exchange)  # hands the launcher the message of what goes wrong


def work(context: StageContext, rank: int, exchange: Path) -> None:
    """Train as one of several ranks. Rank 0 leaves `result.json`, a user's mistake is in `user_error.<rank>.json`."""
    import torch.distributed

    from lightning_llm.stages.train import train

    try:
        result = train(context, rank)
    except UserError as error:
        (exchange / f"user_error.{rank}.json").write_text(json.dumps(error.args))
        raise SystemExit(1) from None
    if rank == 0:
        (exchange / "result.json").write_text(json.dumps(dataclasses.asdict(result)))
    torch.distributed.destroy_process_group()


class ProgressFile:
    """Stands for the console in a rank: what is said goes to a file, at most twice a second."""

    def __init__(self, path: Path):
        self.path, self._next = path, 0.0

    def update(self, done: float, total: float, unit: str, **figures: float) -> None:
        """As `StageConsole.update`."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.5
            self._append("update", [done, total, unit], figures)

    def note(self, text: str) -> None:
        """As `StageConsole.note`; never held back."""
        self._append("note", [text], {})

    def _append(self, method: str, args: list[Any], figures: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([method, args, figures]) + "\n")


@contextmanager
def followed(path: Path, console: StageConsole) -> Iterator[None]:
    """Say on `console` what rank 0 writes to its `ProgressFile`, while the block runs."""
    path.touch()
    done = threading.Event()

    def follow() -> None:
        with path.open() as file:
            ended = False
            while not ended:
                ended = done.wait(0.25)  # read once more after the end
                for line in iter(file.readline, ""):
                    method, args, figures = json.loads(line)
                    getattr(console, method)(*args, **figures)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """The launcher installs its own and leaves them behind."""
    kept: dict[int, Callable | int | None] = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        kept[number] = signal.getsignal(number)
    try:
        yield
    finally:
        for number, handler in kept.items():
            with suppress(ValueError):  # not in the main thread: then nothing was installed either
                signal.signal(number, handler)


def plain(value: Any) -> Any:
    """Dataclasses and paths as JSON, a class by its name: a user's own objective included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__}:{type(value).__qualname__}", "fields": fields}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, dict):
        return {"dict": {key: plain(entry) for key, entry in value.items()}}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def from_plain(value: Any) -> Any:
    """What `plain` was given; tuples come back as lists."""
    match value:
        case {"class": name, "fields": fields}:
            return pkgutil.resolve_name(name)(**{key: from_plain(entry) for key, entry in fields.items()})
        case {"path": path}:
            return Path(path)
        case {"dict": entries}:
            return {key: from_plain(entry) for key, entry in entries.items()}
        case list():
            return [from_plain(entry) for entry in value]
    return value


if __name__ == "__main__":
    main()
