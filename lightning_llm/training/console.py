"""Progress on the console: a line per stage with its place in the run, loss, tokens/s and time left.

On a terminal the line is a live bar; in a file it is printed now and then, and once at the end.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_INTERVAL = 10.0  # seconds between the lines of one stage where there is no terminal


class Console:
    """The console of one run of `total` stages."""

    def __init__(self, total: int, stream: TextIO | None = None):
        self.total = total
        self.stream = sys.stderr if stream is None else stream

    def note(self, text: str) -> None:
        """A line about the run as a whole."""
        print(text, file=self.stream, flush=True)

    def stage(self, index: int, name: str, kind: str) -> StageConsole:
        """Begin stage `index` (from 1). Close what comes back, or use it in a `with`."""
        return StageConsole(f"[{index}/{self.total}] {name}", kind, self.stream)


class StageConsole:
    """One stage's line."""

    def __init__(self, label: str, kind: str, stream: TextIO):
        self.label, self.kind, self.stream = label, kind, stream
        self.started = time.monotonic()
        self._printed = self.started  # when the last plain line was
        self._pace = Pace(self.started)
        self._bar: Progress | None = None
        if stream.isatty():
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, Progress, TextColumn

            # without markup: "[3/9]" is text
            label_column = TextColumn("{task.description}", markup=False)
            columns = (label_column, BarColumn(), TextColumn("{task.fields[figures]}", markup=False))
            self._bar = Progress(*columns, console=Terminal(file=stream), transient=True, refresh_per_second=4)
            self._task = self._bar.add_task(f"{label}  {kind}", total=None, figures="")
            self._bar.start()

    def update(self, done: float, total: float | None, unit: str, **figures: float) -> None:
        """Say how far the stage is.

        Args:
            done, total: in `unit` ("tok", "rows", ...); its rate and the time left follow from them. Without a total
                the amount itself is shown.
            figures: what else to show, as `loss=2.31`.
        """
        now = time.monotonic()
        rate = self._pace.rate(now, done)
        if self._bar is None and now - self._printed < PLAIN_INTERVAL:
            return
        parts = [f"{name} {value:.4g}" for name, value in figures.items()]
        if rate:
            parts.append(f"{in_thousands(rate)} {unit}/s")
            if total is not None:
                parts.append(f"ETA {clock((total - done) / rate)}")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, figures="  ".join(parts))
        else:
            self._printed = now
            share = f"{in_thousands(done)} {unit}" if total is None else f"{done / max(total, 1):4.0%}"
            self._print("  ".join([f"{self.label}  {self.kind}", share, *parts]))

    def note(self, text: str) -> None:
        """A line of its own, kept above the bar."""
        self._print(f"{self.label}  {text}")

    def close(self, summary: str = "") -> None:
        """End the line; `summary` stays on the console with the time the stage took."""
        self._stop()
        self._print("  ".join(filter(None, [self.label, summary or "done", clock(time.monotonic() - self.started)])))

    def __enter__(self) -> StageConsole:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()  # also when the stage failed: a live bar would overwrite the message

    def _print(self, line: str) -> None:
        if self._bar is not None and self._bar.live.is_started:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Pace:
    """How fast something goes, over about the last half minute: a ramp or a slow start shall not spoil the estimate."""

    WINDOW = 30.0  # seconds

    def __init__(self, now: float):
        self._marks = [(now, 0.0)]  # (when, done), about a second apart

    def rate(self, now: float, done: float) -> float:
        """Units per second; 0 as long as it cannot be told."""
        if done < self._marks[-1][1]:  # the next of several things has begun
            self._marks = [(now, done)]
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, done))
            while len(self._marks) > 2 and now - self._marks[1][0] > self.WINDOW:
                self._marks.pop(0)
        when, before = self._marks[0]
        return (done - before) / (now - when) if now > when and done > before else 0.0


def clock(seconds: float) -> str:
    """0:41, 12:05, 3:07:00."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def in_thousands(value: float) -> str:
    """12.4k, 3.1M, 870: three digits are enough on a console."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
