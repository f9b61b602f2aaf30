"""Tasks can be verified and never leak; the embedded text is there, the same each time, and long enough."""

from __future__ import annotations

import re

import pytest

from lightning_llm.data.embedded import tasks, text
from lightning_llm.data.embedded.options import check_embedded
from lightning_llm.settings import UserError

RIGHT = {  # the answer by other means
    "reverse": lambda digits: "".join(reversed(digits)),
    "sort": lambda digits: "".join(sorted(digits)),
    "largest": lambda *numbers: str(max(map(int, numbers))),
    "sum": lambda a, b: str(int(a) + int(b)),
}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_answers_are_right_and_held_out_questions_are_never_trained_on(task):
    held_out = tasks.questions("validation", task, 150)
    trained = tasks.questions("train", task, 600)
    for question in held_out + trained:
        name, *given = question["question"].split(" ")
        assert name == task
        assert question["answer"] == RIGHT[task](*given)
        for style in tasks.STYLES:
            response = tasks.response(question, style)
            assert tasks.score(question, response)
            assert tasks.style_of(response) == style
    asked = {question["question"] for question in held_out}
    assert len(asked) == 150
    assert not asked & {question["question"] for question in trained}


def test_working_ends_where_the_answer_is():
    for task, last in {"reverse": r"(?:\d ?)+", "sort": r".* \d+", "largest": r"\d+ \d+ \d+"}.items():
        for question in tasks.questions("train", task, 50):
            assert re.fullmatch(last, question["working"])
            shown = question["working"].replace(" ", "") if task == "reverse" else question["working"].split(" ")[-1]
            assert shown == question["answer"]
    for question in tasks.questions("train", "sum", 50):
        assert all(eval(step.replace("=", "==")) for step in question["working"].split(" "))


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("answer: 12", True),
        ("working: 1 2\nanswer: 12\n", True),
        ("answer: 12.", False),
        ("answer: 120", False),
        ("answer: 12\nanswer: 13", False),
        ("answer: 12 \nthanks", False),
        ("The answer: 12", False),
        ("Answer: 12", False),
        ("12", False),
        ("", False),
    ],
)
def test_only_the_last_line_counts_and_exactly(response, right):
    assert tasks.score({"answer": "12"}, response) is right


def test_a_style_needs_a_line_of_working():
    assert tasks.style_of("answer: 1") == tasks.style_of("working: \nanswer: 1") == "bare"
    assert tasks.style_of("hm\nanswer: 1") == tasks.style_of("answer: 1\nworking: 1") == "bare"
    assert tasks.style_of("working: 1\nanswer: 1") == "working"


def test_conversations_hold_tasks_and_styles_in_equal_shares():
    conversations = list(tasks.instructions("train", 2000))
    answers = [turn["content"] for messages in conversations for turn in messages if turn["role"] == "assistant"]
    asked = [turn["content"].split(" ")[0] for messages in conversations for turn in messages if turn["role"] == "user"]
    for task in tasks.TASKS:
        styles = [tasks.style_of(answer) for name, answer in zip(asked, answers, strict=True) if name == task]
        assert abs(len(styles) - len(asked) / 4) <= 2
        assert abs(styles.count("working") - len(styles) / 2) <= 2
    assert 0.12 < sum(len(messages) == 4 for messages in conversations) / 2000 < 0.18
    assert list(tasks.instructions("train", 50, seed=1)) != list(tasks.instructions("train", 50))
    held_out = [messages for messages in tasks.instructions("validation", 50)]
    assert all(tasks.is_held_out(turn["content"]) for m in held_out for turn in m if turn["role"] == "user")


def test_both_responses_of_a_pair_are_right():
    for pair in tasks.preferences("validation", 40):
        assert tasks.score(pair, pair["chosen"])
        assert tasks.score(pair, pair["rejected"])
        assert (tasks.style_of(pair["chosen"]), tasks.style_of(pair["rejected"])) == ("working", "bare")
        assert tasks.is_held_out(pair["question"])


def test_all_held_out_questions_can_be_had_and_not_one_more():
    count = tasks.different_questions("validation", "sum", 1200)
    pairs = [f"sum {a} {b}" for a in range(10, 100) for b in range(10, 100)]
    assert count == sum(map(tasks.is_held_out, pairs))
    asked = [question["question"] for question in tasks.questions("validation", "sum", count)]
    assert sorted(asked) == sorted(filter(tasks.is_held_out, pairs))
    with pytest.raises(ValueError, match=f"{count} different questions of sum, not {count + 1}"):
        tasks.questions("validation", "sum", count + 1)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_what_is_asked_is_among_every_question(task):
    every = set(tasks._every_question(task))
    for split in ("train", "validation"):
        assert {question["question"] for question in tasks.questions(split, task, 300)} <= every


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("tasks", {"tsk": "sum"}, ["mine.options.tsk", "task"]),
        ("tasks", {"task": "summ"}, ["mine.options.task", "summ", "largest, sum"]),
        ("tasks", {"task": "sum", "questions": 900}, ["mine.options.questions", "900", "of sum are held out"]),
        ("tasks", {"questions": 900}, ["900", "of sum are held out"]),
        ("tasks", {"questions": "many"}, ["'many'", "whole number"]),
        ("instructions", {"rows": 0}, ["mine.options.rows", "at least 1"]),
        ("instructions", {"multi_turn": 2}, ["mine.options.multi_turn", "between 0 and 1"]),
    ],
)
def test_options_of_an_embedded_source(name, options, parts):
    with pytest.raises(UserError) as caught:
        check_embedded(name, options, "mine")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("domain", ["code", "web"])
def test_text_is_the_same_each_time_and_partly_held_out(domain):
    documents = text.documents(domain, 600_000)
    text.documents.cache_clear()
    assert text.documents(domain, 600_000) == documents
    assert sum(len(document.encode()) for _, document in documents) < 800_000
    names = [name for name, _ in text.documents(domain)]
    assert 0.02 < sum(text.is_held_out(domain, name) for name in names) / len(names) < 0.15
    assert sum(text.is_held_out(domain, name) and len(t) > 4000 for name, t in text.documents(domain)) >= 3


@pytest.mark.parametrize("domain", text.READERS)
def test_no_passage_of_a_held_out_document_is_trained_on(domain):
    train, held_out = set(), set()
    for name, document in text.documents(domain):
        (held_out if text.is_held_out(domain, name) else train).update(
            paragraph.strip() for paragraph in document.split("\n\n") if len(paragraph.strip()) > 120
        )
    assert len(held_out) > 50
    assert len(train) > 5 * len(held_out)
    assert not train & held_out


def test_docstrings_are_read_without_importing(tmp_path):
    file = tmp_path / "module.py"
    file.write_text('"""' + "m" * 200 + '"""\nraise SystemExit\ndef f():\n    """' + "f" * 200 + '"""\n')
    assert text.docstrings(file) == "module\n\n" + "m" * 200 + "\n\n\nf\n\n" + "f" * 200
    file.write_text("def broken(")
    assert text.docstrings(file) == ""


def test_prose_loses_its_markup():
    passages = dict(text._passages({"A": {"b": {"text": "<p>x &amp; y</p>z<br>"}}, "C": 3}))
    assert passages == {("A", "b"): "x & y\nz"}
