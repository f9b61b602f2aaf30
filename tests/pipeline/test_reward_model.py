"""A reward model from comparisons, and samples judged by it: a real run, and what is refused before one."""

from __future__ import annotations

import json
import re

import pytest
import torch

from lightning_llm import compose, run
from lightning_llm.batch import SegmentBatch
from lightning_llm.data.token_store import TokenStore
from lightning_llm.models.reward import RewardModel
from lightning_llm.models.size import ScoreHead, forward_flops
from lightning_llm.report import report
from lightning_llm.settings import UserError
from lightning_llm.stages.samples import read_rows

ADDED = [
    "+stage@stages.sample=sample",
    "stages.sample.models=[sft]",
    "stages.sample.prompts=20",
    "stages.sample.per_prompt=3",
    "stages.sample.max_new_tokens=12",
    "stages.sample.data.tokens_per_example=24",  # the tiny vocabulary spells prompts in more tokens than nano's 14
    "+stage@stages.score=score",
    "stages.score.data=[sample]",
    "judge@stages.score.judge=reward_model",
    "stages.score.judged_by=[reward_model]",
    "+stage@stages.best=select",
    "stages.best.data=[score]",
]

FIGURE = re.compile(r'<script type="application/json">(.*?)</script>')


@pytest.fixture(scope="module")
def judged(beside, tmp_path_factory):
    """The finished run's reward model judges samples of its sft, in a copy of its store."""
    words = beside(tmp_path_factory.mktemp("judged"))
    return run(compose("qwen2", overrides=[*words, *ADDED]), until="best")


def test_rankings_keep_what_is_known_of_them(judged):
    store = TokenStore.open(judged.artifact("reward_model.prepare") / "sources" / "comparisons" / "train")
    assert store.form == "rankings"
    assert store.judged is not None
    assert sorted({int(strength) for strength in store.judged[:, 0]}) == [2, 3, 4]
    edited = [store.segment_offsets(row)[3:] for row in range(12)]
    assert [end > begin for begin, end in edited].count(True) == 4  # a third of them


def test_its_artifact_is_a_classifier_and_it_has_learnt_something(judged):
    folder = judged.artifact("reward_model")
    RewardModel.from_pretrained(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    metrics = json.loads((folder / "stage.json").read_text())["metrics"]
    assert metrics["validation/loss"] < 0.6931  # what equal scores cost
    assert 0 < metrics["validation/rewards/accuracies"] <= 1


def test_it_is_evaluated_on_what_its_own_data_holds_out(judged):
    folder = judged.artifact("reward_model.evaluate")
    metrics = judged.stages["reward_model.evaluate"]["metrics"]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert judged.stages["reward_model"]["metrics"]["preference/accuracy"] == metrics["preference/accuracy"]
    model = RewardModel.from_pretrained(judged.artifact("reward_model") / "model")
    store = TokenStore.open(judged.artifact("reward_model.prepare") / "sources" / "comparisons" / "validation")
    margins = []
    for row in range(store.rows):
        prompt, chosen, rejected, _ = (ids.tolist() for ids in store.row(row).segments)
        with torch.no_grad():
            scores = model.scores(SegmentBatch.from_documents([prompt + chosen, prompt + rejected]))
        margins.append((scores[0] - scores[1]).item())
    assert metrics["preference/margins"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert metrics["preference/accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins), abs=1e-9)
    table = json.loads((folder / "calibration.json").read_text())
    assert [entry["strength"] for entry in table] == ["all", "slightly", "clearly", "significantly"]
    assert table[0]["pairs"] == store.rows == sum(entry["pairs"] for entry in table[1:])
    assert metrics["preference/calibration_error"] == table[0]["calibration_error"]


def test_the_page_shows_how_sure_it_is(judged, tmp_path):
    table = json.loads((judged.artifact("reward_model.evaluate") / "calibration.json").read_text())
    page = report([judged.folder], tmp_path / "report.html").read_text("utf-8")
    assert "Calibration of reward models" in page
    curves = [curve for curve in map(json.loads, FIGURE.findall(page)) if "predicted" in str(curve["layout"]["xaxis"])]
    [drawn] = curves[0]["data"]
    assert drawn["y"] == pytest.approx([each["frequency"] for each in table[0]["bins"]], abs=1e-3)
    markdown = (tmp_path / "report.md").read_text("utf-8")
    for text in (page, markdown):
        for entry in table:
            assert f"{100 * entry['accuracy']:.1f} %" in text
    assert "| slightly |" in markdown


def test_samples_are_judged_by_its_scores(judged):
    model = RewardModel.from_pretrained(judged.artifact("reward_model") / "model")
    samples = list(read_rows(judged.artifact("sample") / "samples.jsonl"))
    verdicts = list(read_rows(judged.artifact("score") / "verdicts.jsonl"))
    assert len(samples) == len(verdicts) == 20
    for sample, verdict in zip(samples, verdicts, strict=True):
        alone = [sample["prompt_ids"] + response["ids"] for response in sample["responses"]]
        with torch.no_grad():
            expected = model.scores(SegmentBatch.from_documents(alone)).tolist()
        assert [each["score"] for each in verdict["verdicts"]] == pytest.approx(expected, abs=1e-4)


def test_what_judging_computes_is_on_record(judged):
    """Every prompt once and every response behind it, by the formula of models/size.py on what was really read."""
    config = RewardModel.from_pretrained(judged.artifact("reward_model") / "model").config
    expected = 0.0
    for row in read_rows(judged.artifact("sample") / "samples.jsonl"):
        batch = SegmentBatch.from_groups([row["prompt_ids"]], [[each["ids"] for each in row["responses"]]])
        expected += forward_flops(config, batch.extents, ScoreHead())
    record = json.loads((judged.artifact("score") / "stage.json").read_text())
    assert record["flops"] == pytest.approx(expected)
    planned = next(node.figures["flops"] for node in judged.plan.nodes if node.name == "score")
    assert 0 < expected <= planned  # which takes all responses to be as long as they may be


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stages.score.judged_by=[dpo]"], "stages.score.judged_by: dpo is a language model. .*reward_model"),
        (["stages.sample.models=[reward_model]"], "stages.sample.models: reward_model is a reward model"),
        (["stages.dpo.starts_from=reward_model"], "stages.dpo.starts_from: reward_model is a reward model"),
        (["objective@stages.sft.objective=mdpo"], "stages.sft.objective: mdpo learns from what the policy samples"),
        (["objective@stages.reward_model.objective=dpo"], "holds rankings, and dpo does not learn from that"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(words, says):
    with pytest.raises(UserError, match=says):
        compose("qwen2", overrides=[*ADDED, *words])


def test_a_reward_model_may_go_on_from_one():
    more = ["+stage@stages.more=reward_model", "stages.more.starts_from=reward_model", "stages.more.lr.peak=1e-5"]
    more += ["stages.more.examples=100", "stages.more.context=1024", "stages.more.batch_tokens=1024"]
    assert compose("qwen2", overrides=[*ADDED, *more])
