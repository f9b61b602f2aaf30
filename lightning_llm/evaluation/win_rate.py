"""How often one model's responses beat another's, with a 95 % interval over the questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2_000  # the interval's ends move by less than a tenth of its width between seeds


@dataclass(frozen=True)
class WinRate:
    """Mean score over questions: a win counts 1, a tie one half."""

    mean: float
    low: float
    high: float


def win_rate(scores: Sequence[float], *, seed: int = 0) -> WinRate:
    """Mean of the judge's scores and the 2.5 % and 97.5 % quantiles of its bootstrap over questions (Efron 1979).

    The bootstrap, not Wilson's interval: scores are no coin tosses, ties count one half.

    Args:
        scores: one per question, in [0, 1].
        seed: of the resampling.

    Raises:
        ValueError: no scores, or one outside [0, 1].
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a win rate needs at least one judged question")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"scores lie in [0, 1], got {values.min()} to {values.max()}")
    draws = np.random.default_rng(seed).integers(values.size, size=(RESAMPLES, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return WinRate(float(values.mean()), float(low), float(high))


def judge_metrics(scores: Sequence[float | None], *, seed: int = 0) -> dict[str, float]:
    """The share of questions that both models have lost, the win rate with its interval over the others, if any, and
    the win rate over all questions in which what both have lost is a loss of the judged model.

    The first rate is one half for a model against itself. The second is not: it falls short of that by half the
    questions that both have lost, and says how much of the first rests on leaving them out.

    Args:
        scores: of a judge's `compare`, one per question; None where both have lost.
        seed: of the interval's resampling.
    """
    decided = [score for score in scores if score is not None]
    metrics = {
        "judge/both_wrong": 1 - len(decided) / len(scores),
        "judge/strict_win_rate": sum(decided) / len(scores),
    }
    if decided:
        rate = win_rate(decided, seed=seed)
        metrics |= {"judge/win_rate": rate.mean, "judge/win_rate_low": rate.low, "judge/win_rate_high": rate.high}
    return metrics
