"""The console: plain lines where there is no terminal, a bar where there is."""

import io

import pytest

from lightning_llm.training import console as module
from lightning_llm.training.console import Console, Pace, clock, in_thousands


class Clock:
    """Stands for `time` so that minutes pass at once."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    monkeypatch.setattr(module, "time", clock := Clock())
    return clock


def test_plain_lines_come_now_and_then(time):
    stream = io.StringIO()
    stage = Console(9, stream).stage(3, "sft", "train")
    for second in range(1, 26):
        time.now += 1
        stage.update(second * 100, 6600, "tok", loss=2.3149)
    stage.note("a remark")
    stage.close("loss 1.2")
    stage.update(1, 2, "tok")
    assert stream.getvalue().splitlines() == [
        "[3/9] sft  train   15%  loss 2.315  100 tok/s  ETA 0:56",
        "[3/9] sft  train   30%  loss 2.315  100 tok/s  ETA 0:46",
        "[3/9] sft  a remark",
        "[3/9] sft  loss 1.2  0:25",
    ]


def test_a_terminal_gets_a_bar_that_goes_away():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Console(2, stream).stage(1, "pretrain", "train") as stage:
        stage.update(50, 100, "tok", loss=2.0)
        stage.note("kept above the bar")
        stage.close("loss 2")
    text = stream.getvalue()
    assert "[1/2] pretrain  train" in text
    assert "loss 2" in text.splitlines()[-1]
    assert "kept above the bar" in text


def test_a_bar_ends_with_a_stage_that_fails():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with pytest.raises(ZeroDivisionError), Console(1, Terminal()).stage(1, "a", "train") as stage:
        _ = 1 / 0
    assert not stage._bar.live.is_started


def test_the_pace_is_of_late():
    pace = Pace(0.0)
    assert pace.rate(0.0, 0) == 0
    for second in range(1, 101):
        rate = pace.rate(float(second), 10.0 * min(second, 50) + 100.0 * max(second - 50, 0))
    assert rate == pytest.approx(100.0)


def test_the_pace_begins_anew_with_the_next_of_several_things():
    pace = Pace(0.0)
    for second in range(1, 5):
        pace.rate(float(second), 1000.0 * second)
    assert pace.rate(5.0, 10) == 0
    assert pace.rate(7.0, 30) == pytest.approx(10.0)


def test_figures_are_short():
    assert [clock(s) for s in (0, 41.4, 725, 11_220)] == ["0:00", "0:41", "12:05", "3:07:00"]
    assert [in_thousands(v) for v in (3.14159, 870, 12_440, 3.1e6, 2e9)] == ["3.14", "870", "12.4k", "3.1M", "2G"]
