"""What rows, or this machine, lack of what stages go by: told before anything trains."""

from __future__ import annotations

import json
import re
import sys

import pytest

from lightning_llm import compose, run
from lightning_llm.pipeline.runner import check_run
from lightning_llm.settings import UserError

RECIPE = """# @package _global_
defaults: [/model: qwen2_7b, /stage@stages.sft: sft, /stage@stages.sample: sample, /stage@stages.score: score, _self_]
stages:
  sft:
    {starts_from: TALKER, examples: 40, context: 128, batch_tokens: 500, evaluate: false,
     data: {sources: {instructions: {path: "embedded:instructions", options: {rows: 60}}}}}
  sample: {models: [sft], per_prompt: 2, max_new_tokens: 4, data: {sources: {questions: {path: prompts.jsonl}}}}
  score: {data: [sample]}
"""

TEXTS = [f"scale.corpora.{name}.path=null" for name in ("web", "docs", "math")]
TEXTS += [
    "stages.sample.per_prompt=2",
    "stages.sample.max_new_tokens=4",
    "scale.corpora.code.max_rows=10",
    "stages.sft.examples=40",
    "stages.sft.data.max_epochs=100",
]
ASKED = [{"prompt": f"what is {number}?", "answer": str(number)} for number in range(8)]
UNKNOWN = [*ASKED, {"prompt": "who is there?"}, {"prompt": "and who else?"}]


@pytest.fixture
def composed(tmp_path, talker, monkeypatch):
    """`composed(rows, *words)` -> the recipe with these prompts, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(RECIPE.replace("TALKER", str(talker)))

    def compose_with(rows, *words):
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return compose("mine", overrides=[*words, *TEXTS, "compute.threads=1"], config_dir=tmp_path)

    return compose_with


def test_prompts_without_an_answer_are_refused_before_training(composed, tmp_path):
    said = (
        "stages.score.judge: asks exact_answer, which goes by a row's `answer`, and 2 of 10 rows of prompts.jsonl "
        "(stages.sample.data.sources.questions) have none, the first: 'who is there?'. Give them one, leave them out "
        "(stages.sample.data.form=questions stages.sample.data.on_error=skip), or choose another judge."
    )
    with pytest.raises(UserError, match=re.escape(said)):
        run(composed(UNKNOWN))
    [record] = (json.loads(path.read_text()) for path in tmp_path.glob("runs/mine/*/run.json"))
    assert "sample.prepare" in record["stages"]
    assert not record["stages"].keys() & {"sft", "sample", "score"}
    remedy = ["stages.sample.data.form=questions", "stages.sample.data.on_error=skip"]
    scored = run(composed(UNKNOWN, *remedy), until="score").stages["score"]["metrics"]
    assert (scored["prompts"], scored["responses"]) == (8, 16)


@pytest.mark.parametrize(("judge", "field"), [("substring", "answer"), ("unit_tests", "tests"), ("weighted", "answer")])
def test_judges_say_what_they_go_by(judge, field, composed):
    with pytest.raises(UserError, match=rf"stages.score.judge: asks {judge}, which goes by a row's `{field}`"):
        run(composed(UNKNOWN, f"judge@stages.score.judge={judge}"))


def test_a_judge_that_goes_by_nothing_refuses_no_rows(composed):
    assert run(composed(UNKNOWN, "judge@stages.score.judge=length"), until="score").status == "done"


def test_what_a_policy_is_asked_is_looked_at_too(composed):
    words = ["+stage@stages.live=online_dpo", "stages.live.starts_from=sft", "stages.live.examples=8"]
    words += ["judge@stages.live.judge=exact_answer", "stages.live.data.sources.prompts.path=prompts.jsonl"]
    with pytest.raises(UserError, match=r"stages.live.judge: asks exact_answer, .* rows of prompts.jsonl"):
        run(composed(UNKNOWN, *words), until="live")


def test_grades_that_no_row_has_are_refused_before_training(composed):
    source = "stages.reward.data.sources.comparisons.path='embedded:comparisons'"
    words = ["+stage@stages.reward=reward_model", "stages.reward.starts_from=sft", "stages.reward.examples=20", source]
    words += ["+stages.reward.data.sources.comparisons.options={rows: 40, held_out: 8}"]
    words += ["stages.reward.objective.graded=[truthfulness]", "stages.reward.batch_tokens=500"]
    with pytest.raises(
        UserError, match=r"stages.reward.objective.graded: has truthfulness, and no row of embedded:comp"
    ):
        run(composed(ASKED, *words), until="reward")
    graded = [
        *words[:4],
        "+stages.reward.data.sources.comparisons.options={rows: 40, held_out: 8, graded: true}",
        *words[5:],
    ]
    metrics = run(composed(ASKED, *graded), until="reward").stages["reward"]["metrics"]
    assert 0 < metrics["grading/loss"] < 3
    assert 0 <= metrics["grading/truthfulness"] <= 1


def test_an_engine_that_is_not_here_is_refused_before_anything_is_made(composed, monkeypatch):
    with pytest.raises(UserError, match=r"stages.sample.engine: is vllm, which needs a GPU, and compute is cpu"):
        check_run(composed(ASKED, "stages.sample.engine=vllm"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"stages.sample.engine: is vllm, which is not installed here"):
        check_run(composed(ASKED, "stages.sample.engine=vllm", "compute=gpu"))
