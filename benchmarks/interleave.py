"""Workers in environments of their own, driven call by call: ours, a peer, another, ours again, in turns.

What a shared machine does to one it does to all, so that ratios of neighbouring calls are steady where absolute times
swing severalfold.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from peers.environments import python_of

WORKERS = Path(__file__).resolve().parent / "workers"
THREADS = 1  # CPU-seconds of one thread hold no waiting of one for another


@dataclass(frozen=True)
class Task:
    """A job of a script in workers/, in the environment of a peer, with settings of its own beside the common ones."""

    script: str
    job: str
    peer: str | None = None  # None: this interpreter and our own code
    settings: Mapping[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """A worker cannot do its job; the message says why."""


class Worker:
    """A process that does one task, a call at a time. A context manager."""

    def __init__(self, task: Task, settings: Mapping[str, Any], folder: Path):
        place = Path(tempfile.mkdtemp(dir=folder))
        (place / "settings.json").write_text(json.dumps({**settings, **task.settings, "threads": THREADS}))
        python = sys.executable if task.peer is None else str(python_of(task.peer))
        count = str(THREADS)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "0"}
        if task.peer is None:
            environment["PYTHONPATH"] = str(machine.REPOSITORY)
        else:
            environment.pop("PYTHONPATH", None)
        self.log = (place / "log.txt").open("w+")
        self.process = subprocess.Popen(
            [python, str(WORKERS / f"{task.script}.py"), task.job, str(place / "settings.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            cwd=place,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        """End of input is the end of the job."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
        self.process.wait()
        self.log.close()

    def versions(self) -> dict[str, str]:
        """Of the libraries that it works with: its first answer."""
        return self._answer()["versions"]

    def call(self, index: int) -> dict[str, Any]:
        """Make call `index` -> `cpu` and `wall` in seconds, `peak` in bytes above the imports, what else the job says.

        Raises:
            Refused: the job failed, with what it said.
        """
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"call": index}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": "the worker died"}
        if "failed" in answer:
            self.log.seek(0)
            raise Refused(f"{answer['failed']}\n{self.log.read()[-3000:]}")
        return answer


@dataclass
class Measurement:
    """What came of each worker's calls, in turns."""

    versions: dict[str, dict[str, str]]  # worker -> library -> version
    warm_up: dict[str, list[dict[str, Any]]]  # worker -> answers; the first is that of the common weights
    calls: dict[str, list[dict[str, Any]]]

    def figures(self, worker: str) -> dict[str, Any]:
        """CPU and wall seconds of a call as median and quartiles, peak memory in bytes above what the imports take."""
        calls = self.calls[worker]
        return {
            "cpu_seconds": quartiles([call["cpu"] for call in calls]),
            "wall_seconds": quartiles([call["wall"] for call in calls]),
            "peak_bytes": max(call["peak"] for call in calls),
            "versions": self.versions[worker],
        }

    def ratios(self, ours: str, theirs: str, figure: str = "cpu") -> dict[str, float]:
        """How often ours fits into theirs, call by call: median and quartiles. Above 1 ours is faster."""
        pairs = zip(self.calls[ours], self.calls[theirs], strict=True)
        return quartiles([their[figure] / our[figure] for our, their in pairs])

    def memory_share(self, ours: str, theirs: str) -> float:
        """Our peak memory over theirs, each above its imports."""
        return self.figures(ours)["peak_bytes"] / self.figures(theirs)["peak_bytes"]


def interleaved(
    tasks: Mapping[str, Task], settings: Mapping[str, Any], folder: Path, *, calls: int, warm_up: int = 3
) -> Measurement:
    """Make calls 0, 1, .. of each task in turns, forwards and backwards alternately; the first `warm_up` do not count.

    Raises:
        Refused: a worker cannot do its job.
    """
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(task, settings, folder)) for name, task in tasks.items()}
        versions = {name: worker.versions() for name, worker in workers.items()}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for index in range(warm_up + calls):
            for name in workers if index % 2 else reversed(workers):
                answers[name].append(workers[name].call(index))
    return Measurement(
        versions,
        {name: found[:warm_up] for name, found in answers.items()},
        {name: found[warm_up:] for name, found in answers.items()},
    )


def require_equal_losses(measurement: Measurement, tolerance: float = 1e-4) -> dict[str, float]:
    """The loss of each worker's first call, on the same weights and data -> by worker.

    Raises:
        Refused: they differ by more than the tolerance: what is timed would not be the same work.
    """
    losses = {name: answers[0]["loss"] for name, answers in measurement.warm_up.items() if "loss" in answers[0]}
    require_close(losses, absolute=tolerance)
    return losses


def require_close(losses: Mapping[str, float], absolute: float = 0.0, relative: float = 0.0) -> None:
    """Refuse losses that differ by more than a tolerance, or are no numbers.

    Raises:
        Refused: names all of them.
    """
    pairs = itertools.product(losses.values(), repeat=2)
    if not all(math.isclose(one, other, rel_tol=relative, abs_tol=absolute) for one, other in pairs):
        raise Refused(f"losses on the same weights and data differ: {losses}")


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, lower and upper quartile, inclusive."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}
