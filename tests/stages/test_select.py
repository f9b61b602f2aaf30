"""From judged samples to rows that a stage of training reads, with the table of who won where."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from lightning_llm.data.rows import read_row
from lightning_llm.evaluation.judges import Question, Response
from lightning_llm.settings import UserError
from lightning_llm.stages import select
from lightning_llm.stages.config import SelectSettings
from lightning_llm.stages.samples import Sampled, read_rows, write_rows

MODELS = ("sft", "dpo")


def settings(**changes):
    common = dict(
        rule="best", form="conversations", minimum_score=None, per_prompt=1, keep=1.0, balance="none", right_from=0.5,
        bins=2, seed=0,
    )  # fmt: skip
    return SelectSettings(**(common | changes))


def sampled(number: int) -> Sampled:
    """Prompt `number` of 12: two responses of each model; how many of them are right grows with it."""
    question = Question("even" if number % 2 == 0 else "odd", f"prompt {number}", [1, 2], str(number))
    texts = [f"{number} of {model} {place}" for model in MODELS for place in range(2)]
    responses = [Response([3, 0], text, True) for text in texts]
    models = [model for model in MODELS for _ in range(2)]
    return Sampled(question, [{"role": "user", "content": f"prompt {number}"}], responses, models)


def scores(number: int) -> list[float]:
    return [float(place < number % 5) for place in range(4)]


@pytest.fixture
def inputs(tmp_path):
    """What a stage that samples and one that judges leave, in two parts."""
    found = {"verdicts.0": tmp_path / "judged"}
    numbers = {"samples.0.0": range(8), "samples.0.1": range(8, 12)}
    for role, part in numbers.items():
        found[role] = tmp_path / role
        found[role].mkdir()
        rows = [sampled(number).to_json([[-0.5, -0.1]] * 4) for number in part]
        write_rows(found[role] / "samples.jsonl", rows)
    found["verdicts.0"].mkdir()
    verdicts = [{"verdicts": [{"score": score, "parts": {}} for score in scores(number)]} for number in range(12)]
    write_rows(found["verdicts.0"] / "verdicts.jsonl", verdicts)
    return found


def run(context_of, inputs, **changes):
    context = context_of(settings(**changes), inputs)
    result = select.run(context)
    table = json.loads((context.output / "table.json").read_text())
    return result, list(read_rows(context.output / "rows.jsonl")), table


def test_samples_are_what_they_were():
    assert Sampled.from_json(json.loads(json.dumps(sampled(3).to_json([[-0.5, -0.1]] * 4)))) == sampled(3)


def test_the_best_of_each_prompt_becomes_a_conversation(inputs, context_of):
    result, rows, table = run(context_of, inputs, minimum_score=0.5)
    assert result.metrics["rows"] == len(rows) == 9  # of prompts 0, 5 and 10 no response is right
    for row in rows:
        content = read_row(row, {}, "here", "conversations").content
        asked, said = content["messages"]
        number = int(said["content"].split(" ")[0])
        place = [f"{number} of {model} {place}" for model in MODELS for place in range(2)].index(said["content"])
        assert asked["content"] == f"prompt {number}"
        assert (row["score"], scores(number)[place]) == (1.0, 1.0)
        assert row["model"] == said["content"].split(" ")[2]
    kept = Counter(row["model"] for row in rows)
    assert {model: entry["kept"] for model, entry in table["models"].items()} == kept
    assert {task: entry["prompts"] for task, entry in table["tasks"].items()} == {"even": 6, "odd": 6}
    right = [score for number in range(12) for score in scores(number)]
    assert result.metrics["right/all"] == pytest.approx(sum(right) / len(right))
    assert (result.metrics["right/kept"], result.metrics["right/any"]) == (1.0, pytest.approx(9 / 12))


def test_pairs_are_read_as_pairs(inputs, context_of):
    _, rows, _ = run(context_of, inputs, form="pairs")
    assert len(rows) == 7  # where all responses are right, or none, no two differ
    for row in rows:
        content = read_row(row, {}, "here", "pairs").content
        number = int(content["answer"])
        texts = [f"{number} of {model} {place}" for model in MODELS for place in range(2)]
        assert scores(number)[texts.index(content["chosen"])] == 1.0
        assert scores(number)[texts.index(content["rejected"])] == 0.0


def test_what_was_dropped_is_counted_and_the_remedy_goes_by_it(inputs, context_of):
    """Of 48 responses most were cut off, say nothing, or score below the minimum: each with its own remedy."""

    def says(change, **changes):
        for role in ("samples.0.0", "samples.0.1"):
            path = inputs[role] / "samples.jsonl"
            rows = list(read_rows(path))
            for row in rows:
                for place, response in enumerate(row["responses"]):
                    response |= change(place)
            write_rows(path, rows)
        names = {"samples.0.0": "sample", "samples.0.1": "more", "verdicts.0": "score"}
        with pytest.raises(UserError) as told:
            select.run(context_of(settings(**changes), inputs, names=names))
        return str(told.value)

    assert says(lambda place: {}, minimum_score=2.0) == (
        "stages.stage: keeps none of 48 responses: 48 score below stages.stage.minimum_score. "
        "Lower stages.stage.minimum_score, or sample more of each prompt."
    )
    assert says(lambda place: {}, keep=0.01) == "stages.stage.keep: is 0.01, and leaves none of 12 rows. Raise it."
    assert says(lambda place: {"text": "" if place == 3 else "x", "is_complete": place == 3}) == (
        "stages.stage: keeps none of 48 responses: 36 were cut off, 12 say nothing. "
        "Raise stages.sample.max_new_tokens and stages.more.max_new_tokens."
    )
    whole = {"text": "the same", "is_complete": True}
    assert "48 are not better than another" in says(lambda place: whole, form="pairs", rule="random")


def test_hard_prompts_weigh_as_much_as_easy_ones(inputs, context_of):
    _, rows, table = run(context_of, inputs, minimum_score=0.5, keep=4 / 9, balance="difficulty")
    assert len(rows) == 4
    right = [sum(scores(int(row["messages"][0]["content"].split(" ")[1]))) / 4 for row in rows]
    assert Counter(share <= 0.5 for share in right) == {True: 2, False: 2}
    assert sum(entry["kept"] for entry in table["difficulty"].values()) == 4


def test_scores_that_only_rank_say_nothing_of_right_ones(inputs, context_of):
    context = context_of(settings(right_from=None), inputs)
    result = select.run(context)
    table = json.loads((context.output / "table.json").read_text())
    assert not [name for name in result.metrics if name.startswith("right/")]
    assert {"score/all", "score/kept"} <= result.metrics.keys()
    assert [entry["right"] for part in ("models", "tasks") for entry in table[part].values()] == [None] * 4
    said = context.console.stream.getvalue()
    assert "who won" in said
    assert "by difficulty" not in said
    with pytest.raises(UserError, match="balance: is by difficulty, and nobody has judged which responses are right"):
        run(context_of, inputs, right_from=None, balance="difficulty", keep=0.5)


def test_a_control_asks_nobody(inputs, context_of):
    alone = {role: path for role, path in inputs.items() if role != "verdicts.0"}
    result, rows, table = run(context_of, alone, rule="first")
    assert [row["messages"][1]["content"] for row in rows] == [f"{number} of sft 0" for number in range(12)]
    assert "score/all" not in result.metrics
    assert table["models"]["sft"]["kept"] == 12
    for rule, where in (("best", "rule"), ("threshold", "rule")):
        with pytest.raises(UserError, match=where):
            run(context_of, alone, rule=rule, minimum_score=0.5)
    with pytest.raises(UserError, match="balance"):
        run(context_of, alone, rule="first", balance="difficulty", keep=0.5)


def test_the_seed_decides_and_nothing_else(inputs, context_of):
    assert run(context_of, inputs)[1] == run(context_of, inputs)[1]
    assert run(context_of, inputs)[1] != run(context_of, inputs, seed=1)[1]


def test_two_stages_that_ask_the_same_make_one_committee(inputs, context_of, tmp_path):
    twice = {"samples.0.0": inputs["samples.0.0"], "samples.1.0": inputs["samples.0.0"]}
    _, rows, table = run(context_of, twice, rule="random")
    assert len(rows) == 8
    assert table["models"]["sft"]["samples"] == 32


def test_where_nothing_is_good_enough(inputs, context_of):
    with pytest.raises(UserError, match="keeps none of 48 responses"):
        run(context_of, inputs, minimum_score=2.0)


def test_the_table_is_said(inputs, context_of):
    context = context_of(settings(), inputs)
    select.run(context)
    said = context.console.stream.getvalue()
    assert "who won" in said
    assert "up to 1/2 right" in said
