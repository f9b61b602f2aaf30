"""Grades of single responses are learnt beside the comparisons: AFM's regulariser, on rows whose grades are known."""

from __future__ import annotations

import json
import math
from statistics import fmean

import pytest

from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.embedded import tasks
from lightning_llm.objectives.config import RewardModelConfig
from lightning_llm.stages import evaluate, prepare, train
from lightning_llm.stages.config import EvaluateRewardsSettings, PrepareSettings


def test_graded_is_whether_the_answer_is_right():
    """By the answer itself; all else of a comparison is as it is without grades."""
    plain = list(tasks.comparisons("train", 60, seed=1))
    for before, row in zip(plain, map(tasks.with_grades, plain), strict=True):
        assert {name: value for name, value in row.items() if name != "grades"} == before
        right = "answer: " + row["answer"]
        named = {name for name in ("chosen", "rejected", "edited") if name in row}
        assert row["grades"].keys() == named
        for name in named:
            assert row["grades"][name] == {"truthfulness": 2 if row[name].endswith(f"{right}") else 0}
    assert {row["grades"]["rejected"]["truthfulness"] for row in map(tasks.with_grades, plain)} == {0, 2}


def test_the_loss_of_grades_falls(tokenizer_artifact, settings, context_of):
    """From that of a guess among three towards that of knowing how many are right, and below it is what was read."""
    source = SourceConfig(path="embedded:comparisons", options={"rows": 300, "held_out": 40, "graded": True})
    data = DataConfig("graded", "rankings", {"comparisons": source}, max_epochs=50)
    rows = context_of(PrepareSettings(data, [128], ["train", "validation"], seed=0), {"tokenizer": tokenizer_artifact})
    prepare.run(rows)
    objective = RewardModelConfig(loss="soft_labels", graded=["truthfulness"])
    ramp = [{"at": 0, "value": 600}]
    context = context_of(
        settings(objective=objective, data=data, tokens=60_000, context=[{"at": 0, "value": 128}], batch_tokens=ramp),
        {"tokenizer": tokenizer_artifact, "data": rows.output},
    )
    train.run(context)
    lines = [json.loads(line) for line in (context.output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["grading/loss"] for line in lines if "grading/loss" in line]
    assert losses[0] == pytest.approx(math.log(3), abs=0.3)
    assert fmean(losses[-20:]) < 0.6 * fmean(losses[:3])
    settled = EvaluateRewardsSettings(40, 128, "drop", "fp32")
    inputs = {"model": context.output, "data": rows.output, "tokenizer": tokenizer_artifact}
    assert evaluate.run(context_of(settled, inputs)).metrics["grading/truthfulness"] > 0.6
