"""The worker's end of the pipe: a job makes one call each time the driver asks, and is timed and weighed here.

A worker is a script of this folder, run by the interpreter of its own environment. Nothing but the standard library is
needed here, so that every environment can import it. The driver's end is `benchmarks/interleave.py`; both speak lines
of JSON: `{"call": 3}` in, `{"cpu": 1.2, "wall": 1.3, ...}` out.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Job = Callable[["Calls"], None]


class Calls:
    """What the driver asks for, one call at a time.

    A plain job is a loop:

        calls.before_building()
        model = ...
        for index in calls:
            calls.done(loss=step(index))

    One whose loop belongs to a trainer calls `wait()` and `done()` from inside it.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.baseline = 0  # bytes
        # the pipe is ours alone: what libraries print goes to standard error
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def before_building(self) -> None:
        """All is imported and nothing is built: what memory is used from here on is the job's."""
        self.baseline = _memory("VmRSS")

    def wait(self) -> int:
        """The index of the next call; the clock starts. Ends the process when the driver wants no more."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # a trainer in the midst of its loop has nothing to tidy up
        index = json.loads(line)["call"]
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return index

    def done(self, **figures: Any) -> None:
        """Stop the clock and answer, with what the job found beside it."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        peak = _memory("VmHWM") - self.baseline
        self.answer(cpu=cpu, wall=wall, peak=peak, baseline=self.baseline, **figures)

    def __iter__(self) -> Iterator[int]:
        while True:
            yield self.wait()

    def answer(self, **content: Any) -> None:
        self._answers.write(json.dumps(content) + "\n")
        self._answers.flush()


def serve(jobs: dict[str, Job], libraries: list[str]) -> None:
    """Run the job that the command line names: `script.py JOB SETTINGS.json`.

    The first answer says the versions of `libraries`, or why the job cannot be done here.
    """
    name, path = sys.argv[1:]
    calls = Calls(json.loads(Path(path).read_text()))
    try:
        import torch

        torch.set_num_threads(calls.settings["threads"])
        calls.answer(versions={name: importlib.metadata.version(name) for name in ["torch", *libraries]})
        jobs[name](calls)
    except Exception as error:
        traceback.print_exc()
        calls.answer(failed=f"{type(error).__name__}: {error}")


def _memory(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, resident now; VmHWM, the most that ever was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux alone")
