"""Verdicts on samples: in their order, continued where they were cut, and by judges that depend on nothing else."""

from __future__ import annotations

import json

import pytest

from lightning_llm.evaluation.config import ExactAnswerConfig, RandomConfig
from lightning_llm.evaluation.judges import JudgeContext, Question, Response
from lightning_llm.settings import UserError
from lightning_llm.stages import judge
from lightning_llm.stages.config import JudgeSettings
from lightning_llm.stages.samples import Sampled, read_rows, write_rows

ANSWERS = ("answer: {}", "working: 1\nanswer: {}", "answer: none", "answer: {}")


def sampled(number: int) -> Sampled:
    """Four responses to prompt `number`: two are right, one is wrong, one is right and cut off."""
    question = Question("sum", f"prompt {number}", [1, 2], str(number))
    responses = [Response([3], text.format(number), place < 3) for place, text in enumerate(ANSWERS)]
    return Sampled(question, [{"role": "user", "content": f"prompt {number}"}], responses, ["sft"] * 4)


@pytest.fixture
def inputs(tmp_path):
    found = {}
    for place, numbers in enumerate((range(5), range(5, 7))):
        folder = found[f"samples.{place}"] = tmp_path / str(place)
        folder.mkdir()
        write_rows(folder / "samples.jsonl", [sampled(number).to_json([[0.0]] * 4) for number in numbers])
        (folder / "tokenizer_fingerprint").write_text("same")
    return found


def settings(config=None, seed=0):
    return JudgeSettings(config or ExactAnswerConfig(), "fp32", seed)


def test_verdicts_stand_in_the_order_of_the_samples(inputs, context_of):
    context = context_of(settings(), inputs)
    result = judge.run(context)
    rows = list(read_rows(context.output / "verdicts.jsonl"))
    assert [[verdict["score"] for verdict in row["verdicts"]] for row in rows] == [[1.0, 1.0, 0.0, 0.0]] * 7
    assert result.metrics == {"prompts": 7, "responses": 28, "score/best": 1.0, "score/mean": 0.5}


@pytest.mark.parametrize("cut", [0, 10, 200, 700, 10_000])
def test_what_was_judged_before_is_not_judged_again(cut, inputs, context_of, monkeypatch):
    monkeypatch.setattr(judge, "TOGETHER", 2)
    whole = context_of(settings(RandomConfig()), inputs)
    judge.run(whole)
    expected = (whole.output / "verdicts.jsonl").read_bytes()
    context = context_of(settings(RandomConfig()), inputs)
    (context.output / "verdicts.jsonl").write_bytes(expected[:cut])
    asked = []

    def note(the_judge, rows, judged=judge.judged):
        asked.append(len(rows))
        return judged(the_judge, rows)

    monkeypatch.setattr(judge, "judged", note)
    judge.run(context)
    assert (context.output / "verdicts.jsonl").read_bytes() == expected
    there = expected[:cut].count(b"\n")
    assert sum(asked) == 7 - (7 if there == 7 else there // 2 * 2)


def test_a_random_judge_depends_on_seed_question_and_response_alone(tmp_path):
    questions, responses = zip(
        *((sampled(n).question, r) for n in range(50) for r in sampled(n).responses), strict=True
    )

    def scores(seed):
        build = RandomConfig().build(JudgeContext([], "cpu", 100, seed))
        return [verdict.score for verdict in build(questions, responses)]

    assert scores(0) == scores(0) != scores(1)
    assert len(set(scores(0))) == 150  # the first and the last response of a prompt have the same text
    assert abs(sum(scores(0)) / 200 - 0.5) < 4 * (1 / 12 / 150) ** 0.5
    again = RandomConfig().build(JudgeContext([], "cpu", 100, 0))(questions[:3], responses[:3])
    assert [verdict.score for verdict in again] == scores(0)[:3]


def test_a_reward_model_has_the_tokenizer_of_the_samples(inputs, context_of, talker):
    with pytest.raises(UserError, match="tokenizer"):
        judge.run(context_of(settings(), inputs | {"reward_model.0": talker}))


def test_verdicts_are_plain_rows(inputs, context_of):
    context = context_of(settings(), inputs)
    judge.run(context)
    first = json.loads((context.output / "verdicts.jsonl").read_text().splitlines()[0])
    assert first["verdicts"][0] == {"score": 1.0, "parts": {}}
