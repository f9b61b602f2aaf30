"""Schedules: both ends, a middle, and what must hold for any ramp."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.optimization.config import LearningRateConfig
from lightning_llm.schedules import (
    BatchPlan,
    Progress,
    as_ramp,
    constant,
    cosine,
    final_learning_rate,
    learning_rate,
    linear,
    ramp_value,
    wsd,
)

SHAPE = {"peak": 1.0, "final": 0.2, "warmup": 100.0, "total": 1100.0}
EXPECTED = {  # tokens -> rate, by hand
    cosine: {0: 0.0, 50: 0.5, 100: 1.0, 600: 0.6, 1100: 0.2, 5000: 0.2},
    linear: {0: 0.0, 50: 0.5, 100: 1.0, 600: 0.6, 850: 0.4, 1100: 0.2, 5000: 0.2},
}


@pytest.mark.parametrize("schedule", EXPECTED, ids=lambda f: f.__name__)
def test_decaying_schedules(schedule):
    for tokens, rate in EXPECTED[schedule].items():
        assert schedule(tokens, **SHAPE) == pytest.approx(rate)


def test_cosine_is_steepest_in_the_middle():
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert cosine(350, **SHAPE) == pytest.approx(quarter)


def test_wsd_is_flat_until_its_last_share():
    rates = {t: wsd(t, **SHAPE, decay_share=0.2) for t in (0, 50, 100, 700, 880, 990, 1100, 2000)}
    assert rates == pytest.approx({0: 0, 50: 0.5, 100: 1, 700: 1, 880: 1, 990: 0.6, 1100: 0.2, 2000: 0.2})


def test_constant():
    assert [constant(t, peak=2.0, warmup=10.0) for t in (0, 5, 10, 1e9)] == [0.0, 1.0, 2.0, 2.0]
    assert constant(0, peak=2.0) == 2.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_learning_rate_reaches_peak_and_final(schedule):
    config = LearningRateConfig(schedule=schedule, peak=3e-4, warmup_tokens=1000)
    assert learning_rate(config, 500, 1e5) == pytest.approx(1.5e-4)
    assert learning_rate(config, 1000, 1e5) == pytest.approx(3e-4)
    assert learning_rate(config, 1e5, 1e5) == pytest.approx(final_learning_rate(config))
    assert final_learning_rate(dataclasses.replace(config, final=1e-5)) == 1e-5
    without = dataclasses.replace(config, warmup_tokens=None)
    assert learning_rate(without, 0, 1e5) == pytest.approx(3e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_a_stretched_schedule_is_the_beginning_of_a_longer_one(schedule):
    whole = LearningRateConfig(schedule, peak=1.0, warmup_tokens=100)
    half = dataclasses.replace(whole, stretch=2)
    for tokens in (0, 50, 100, 300, 499, 500):
        assert learning_rate(half, tokens, 500) == learning_rate(whole, tokens, 1000)
    assert learning_rate(dataclasses.replace(half, schedule="cosine", warmup_tokens=0), 500, 500) == 0.55
    with pytest.raises(ValueError, match=r"stretch must be at least 1, got 0\.5"):
        dataclasses.replace(whole, stretch=0.5)


def test_default_final_rates():
    finals = {
        s: final_learning_rate(LearningRateConfig(schedule=s, peak=1.0))
        for s in ("constant", "linear", "cosine", "wsd")
    }
    assert finals == {"constant": 1.0, "linear": 0.0, "cosine": 0.1, "wsd": 0.0}


def test_a_final_rate_as_a_share_of_the_peak():
    config = LearningRateConfig("cosine", peak=8e-5, final_share=0.01)
    assert learning_rate(config, 1000, 1000) == final_learning_rate(config) == pytest.approx(8e-7)
    assert final_learning_rate(dataclasses.replace(config, final=1e-6)) == 1e-6  # absolute: the last word


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": "sine"}, {"peak": None}, {"warmup_steps": 3}, {"warmup_tokens": 1, "warmup_share": 0.1}],
    ids=["unknown", "no peak", "steps", "two warm-ups"],
)
def test_wrong_learning_rates_are_refused(wrong):
    with pytest.raises(ValueError):
        learning_rate(LearningRateConfig(**wrong), 1, 10)


def test_warmup_share():
    assert learning_rate(LearningRateConfig(peak=1.0, warmup_share=0.1), 50, 1000) == pytest.approx(0.5)


def test_ramps():
    assert as_ramp(8) == [{"at": 0, "value": 8}]
    ramp = as_ramp([{"at": 0, "value": 8}, {"at": 100, "value": 16}])
    assert [ramp_value(ramp, at) for at in (0, 99, 100, 1e9)] == [8, 8, 16, 16]
    for wrong in ([], [{"at": 1, "value": 2}], [{"at": 0, "value": 1}, {"at": 0, "value": 2}], [{"at": 0}]):
        with pytest.raises(ValueError):
            as_ramp(wrong)


def test_batch_plan_by_hand():
    ramp = as_ramp([{"at": 0, "value": 10}, {"at": 25, "value": 20}, {"at": 26, "value": 7}, {"at": 60, "value": 40}])
    # 0 10 20 | 30 (ramp at 30 is 7: the piece of 20 is stepped over) 37 44 51 58 | 65 105
    assert [BatchPlan(ramp, 145).boundary(t) for t in range(12)] == [0, 10, 20, 30, 37, 44, 51, 58, 65, 105, 145, 145]
    assert [BatchPlan(ramp, total).steps for total in (145, 165, 164, 106, 4, 0)] == [10, 11, 10, 9, 1, 0]


@given(
    pieces=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 90)), min_size=1, max_size=5),
    total=st.integers(0, 2000),
)
def test_batch_plan_equals_walking_the_ramp(pieces, total):
    starts = [0]
    for length, _ in pieces[:-1]:
        starts.append(starts[-1] + length)
    ramp = [{"at": at, "value": size} for at, (_, size) in zip(starts, pieces, strict=True)]
    walked = [0]
    while walked[-1] < total:
        walked.append(walked[-1] + ramp_value(ramp, walked[-1]))
    if len(walked) > 2 and 2 * (total - walked[-2]) < walked[-1] - walked[-2]:
        walked.pop()
    walked[-1] = total
    plan = BatchPlan(ramp, total)
    assert [plan.boundary(t) for t in range(plan.steps + 1)] == walked
    for tokens in {0, 1, total // 2, total}:
        assert plan.step_at(tokens) == sum(boundary < tokens for boundary in walked[:-1])


def test_progress_is_a_value():
    assert Progress(tokens=5) == Progress(5, 0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Progress().tokens = 1
