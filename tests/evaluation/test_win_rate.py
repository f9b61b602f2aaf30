"""The win rate and its interval."""

import numpy as np
import pytest

from lightning_llm.evaluation.win_rate import judge_metrics, win_rate


def test_a_tie_counts_one_half():
    assert win_rate([1.0, 0.5, 0.0, 0.5]).mean == 0.5


def test_equal_scores_leave_no_doubt():
    rate = win_rate([0.5] * 40)
    assert (rate.mean, rate.low, rate.high) == (0.5, 0.5, 0.5)


def test_the_interval_is_the_normal_one_for_many_questions():
    scores = np.random.default_rng(3).choice([0.0, 0.5, 1.0], size=400, p=[0.2, 0.3, 0.5])
    rate = win_rate(scores.tolist())
    half = 1.96 * scores.std() / np.sqrt(scores.size)
    assert rate.mean == pytest.approx(scores.mean())
    assert rate.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert rate.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    samples = generator.choice([0.0, 0.5, 1.0], size=(200, 100), p=[0.3, 0.2, 0.5])  # true mean 0.6
    rates = [win_rate(row.tolist()) for row in samples]
    assert 0.9 <= np.mean([rate.low <= 0.6 <= rate.high for rate in rates]) <= 0.99


@pytest.mark.parametrize("scores", [[], [0.5, 1.5], [-0.1]])
def test_scores_outside_their_range_are_refused(scores):
    with pytest.raises(ValueError):
        win_rate(scores)


def test_questions_that_both_lost_are_told_and_not_counted():
    metrics = judge_metrics([1.0, None, 0.5, None, 1.0, 0.0, None, 1.0], seed=3)
    rate = win_rate([1.0, 0.5, 1.0, 0.0, 1.0], seed=3)
    expected = {"both_wrong": 3 / 8, "win_rate": 0.7, "win_rate_low": rate.low, "win_rate_high": rate.high}
    expected["strict_win_rate"] = 3.5 / 8
    assert metrics == pytest.approx({f"judge/{name}": value for name, value in expected.items()})
    assert judge_metrics([None, None]) == {"judge/both_wrong": 1.0, "judge/strict_win_rate": 0.0}
