"""Rows of every form come out in one shape, whatever their fields, and a malformed one says what is wrong."""

from __future__ import annotations

import pytest

from lightning_llm.data.rows import LAYOUTS, ROW_FIELDS, Row, read_row
from lightning_llm.settings import UserError

SYSTEM = {"role": "system", "content": "Be brief"}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
GOOD = {
    "text": ({"text": "abc"}, "text", {"text": "abc"}),
    "messages": ({"messages": [USER, ASSISTANT]}, "conversations", {"messages": [USER, ASSISTANT]}),
    "prompt and completion": ({"prompt": "hi", "completion": "ho"}, "conversations", {"messages": [USER, ASSISTANT]}),
    "messages and completion": (
        {"prompt": [USER], "completion": [ASSISTANT]},
        "conversations",
        {"messages": [USER, ASSISTANT]},
    ),
    "pair": (
        {"prompt": "hi", "chosen": "ho", "rejected": "hu", "answer": "ho"},
        "pairs",
        {"prompt": [USER], "chosen": "ho", "rejected": "hu", "answer": "ho"},
    ),
    "pair of conversations": (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "hu"}]},
        "pairs",
        {"prompt": [USER], "chosen": "ho", "rejected": "hu"},
    ),
    "question": (
        {"prompt": "hi", "answer": "ho", "task": "greet"},
        "questions",
        {"prompt": [USER], "answer": "ho", "task": "greet"},
    ),
    "turns of from and value": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho", "weight": 1}]},
        "conversations",
        {"messages": [USER, ASSISTANT]},
    ),
    "turns by column": (
        {"conversations": {"from": ["human", "gpt"], "value": ["hi", "ho"]}},
        "conversations",
        {"messages": [USER, ASSISTANT]},
    ),
    "roles in conversations": (
        {"conversations": [USER, ASSISTANT]},
        "conversations",
        {"messages": [USER, ASSISTANT]},
    ),
    "instruction alone": (
        {"instruction": "hi", "output": "ho"},
        "conversations",
        {"messages": [USER, ASSISTANT]},
    ),
    "instruction and input": (
        {"instruction": "Say it", "input": "hi", "output": "ho"},
        "conversations",
        {"messages": [{"role": "user", "content": "Say it\n\nhi"}, ASSISTANT]},
    ),
    "pair with its prompt inside": (
        {
            "prompt": "hi",
            "chosen": [USER, ASSISTANT],
            "rejected": [USER, {**ASSISTANT, "content": "hu"}],
            "messages": [],
        },
        "pairs",
        {"prompt": [USER], "chosen": "ho", "rejected": "hu"},
    ),
    "pair with more than its prompt inside": (
        {
            "prompt": "hi",
            "chosen": [SYSTEM, USER, ASSISTANT],
            "rejected": [SYSTEM, USER, {**ASSISTANT, "content": "hu"}],
        },
        "pairs",
        {"prompt": [SYSTEM, USER], "chosen": "ho", "rejected": "hu"},
    ),
    "pair behind a conversation": (
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "ho"},
            "rejected": {"from": "gpt", "value": "hu"},
        },
        "pairs",
        {"prompt": [USER], "chosen": "ho", "rejected": "hu"},
    ),
    "empty columns of a table": ({"text": "abc", "messages": None}, "text", {"text": "abc"}),
}
BAD = {
    "no field": ({"prompt": "hi", "chosen": "ho"}, 'no field "rejected" (found: prompt, chosen)'),
    "nothing known": ({"body": "x"}, 'no field "text" (found: body)'),
    "prompt alone": ({"prompt": "hi"}, 'no field "completion"'),
    "a list": (["text"], "is a list and not an object"),
    "number as text": ({"text": 3}, '"text" is a number and not text'),
    "empty": ({"text": " \n"}, '"text" is empty'),
    "messages as object": ({"messages": {}}, '"messages" is an object and not text or a list'),
    "no role": ({"messages": [{"content": "x"}]}, 'turn 1 of "messages" has no role'),
    "unknown role": ({"messages": [USER, {**ASSISTANT, "role": "bot"}]}, "turn 2 of \"messages\" has the role 'bot'"),
    "content of parts": ({"messages": [{**USER, "content": []}]}, "has a list as content"),
    "nobody answers": ({"messages": [USER]}, "the assistant says nothing"),
    "answer by the user": ({"prompt": "hi", "chosen": [USER], "rejected": "x"}, '"chosen" does not end in a turn'),
    "no output": ({"instruction": "x"}, 'no field "output" (found: instruction)'),
    "an output without words": ({"instruction": "x", "output": " "}, '"output" is empty'),
    "a number as input": ({"instruction": "x", "input": 3, "output": "y"}, '"input" is a number and not text'),
    "unknown speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, "has the role 'narrator'"),
    "different prompts": ({"chosen": [USER, ASSISTANT], "rejected": [ASSISTANT, ASSISTANT]}, 'has no "prompt"'),
}


@pytest.mark.parametrize(("fields", "form", "content"), GOOD.values(), ids=GOOD.keys())
def test_rows_come_out_in_one_shape(fields, form, content):
    assert read_row(fields, {}, "f:1") == Row("f:1", form, content)


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD.keys())
def test_a_malformed_row_says_what_is_wrong(fields, message):
    with pytest.raises(UserError) as error:
        read_row(fields, {}, "pairs.jsonl:1374")
    assert str(error.value).startswith("pairs.jsonl:1374: ")
    assert message in str(error.value)
    assert "data.on_error=skip" in str(error.value)


def test_a_pair_may_repeat_its_prompt_and_nothing_else():
    prompt = [{"role": "user", "content": "hi"}]
    answer = {"role": "assistant", "content": "yes"}
    row = {"prompt": "hi", "chosen": [*prompt, answer], "rejected": [answer]}
    assert read_row(row, {}, "x:1").content == {"prompt": prompt, "chosen": "yes", "rejected": "yes"}
    other = [{"role": "user", "content": "ho"}, answer]
    with pytest.raises(UserError, match='x:1: "chosen" has turns before its answer'):
        read_row({**row, "chosen": other}, {}, "x:1")


PROMPTS = {
    "alone": ({"prompt": "hi"}, {"prompt": [USER], "answer": "", "task": "prompts"}),
    "with an answer": ({"prompt": "hi", "answer": "ho"}, {"prompt": [USER], "answer": "ho", "task": "prompts"}),
    "with tests": (
        {"prompt": "hi", "tests": "assert f() == 1", "task": "code"},
        {"prompt": [USER], "answer": "", "task": "code", "tests": "assert f() == 1"},
    ),
    "of a pair": (
        {"prompt": [SYSTEM, USER], "chosen": "ho", "rejected": "hu"},
        {"prompt": [SYSTEM, USER], "answer": "", "task": "prompts"},
    ),
    "of a conversation": (
        {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
        {"prompt": [USER, ASSISTANT, USER], "answer": "", "task": "prompts"},
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_needs_no_answer_if_prompts_are_asked_for(case):
    fields, content = PROMPTS[case]
    assert read_row(fields, {}, "f:1", "prompts") == Row("f:1", "prompts", content)
    if case == "alone":  # an evaluation would count every response to it as wrong
        with pytest.raises(UserError, match='no field "completion"'):
            read_row(fields, {}, "f:1", "questions")


def test_of_several_forms_the_one_that_is_asked_for_counts():
    alpaca = {"instruction": "hi", "input": None, "output": "ho", "text": "### hi: ho"}
    assert read_row(alpaca, {}, "x", "conversations").content == {"messages": [USER, ASSISTANT]}
    assert read_row(alpaca, {}, "x", "text").content == read_row(alpaca, {}, "x").content == {"text": "### hi: ho"}
    named = read_row(alpaca, {"text": "text"}, "x", "conversations")  # said by name
    assert named.form == "text"
    pair = {"prompt": "hi", "chosen": "ho", "rejected": None, "messages": [USER, ASSISTANT]}
    assert read_row(pair, {}, "x", "conversations").form == "conversations"
    with pytest.raises(UserError, match='no field "rejected"'):
        read_row(pair, {}, "x", "pairs")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_field_of_a_layout_may_have_another_name(layout):
    """What `columns` may name is what is read; the row is the same as under the fields' own names."""
    row = next(
        fields
        for fields, form, _ in [*GOOD.values(), *((fields, "prompts", None) for fields, _ in PROMPTS.values())]
        if form == layout.form and set(layout.needs) <= fields.keys() <= {*layout.needs, *layout.also}
    )
    renamed = {f"my {name}": value for name, value in row.items()}
    columns = {name: f"my {name}" for name in row}
    assert columns.keys() <= set(ROW_FIELDS)
    asked = "prompts" if layout.form == "prompts" else None
    read = read_row(renamed, columns, "x", asked)
    assert (read.form, read.content, read.layout) == (layout.form, read_row(row, {}, "x", asked).content, layout.name)


def test_columns_lead_into_nested_ones():
    row = {"data": {"body": "abc", "none": None}, "data.body": "dotted", "empty": None}
    assert read_row(row, {"text": "data.body"}, "x").content == {"text": "dotted"}
    del row["data.body"]
    assert read_row(row, {"text": "data.body"}, "x").content == {"text": "abc"}
    for path, message in {
        "data.bdy": r'no field "data\.bdy" \(found in data: body, none\)',
        "data.body.more": r'no field "data\.body\.more" \(found in data\.body: nothing\)',
        "daat.body": r'no field "daat\.body" \(found: data, empty\)',
        "empty.body": r'no field "text"',  # a table leaves it empty
    }.items():
        with pytest.raises(UserError, match=message):
            read_row(row, {"text": path}, "x")


def test_the_split_is_one_for_all_and_goes_by_the_prompt():
    rows = [read_row({"prompt": str(i), "chosen": "a", "rejected": "b"}, {}, "f") for i in range(2000)]
    others = [read_row({"prompt": str(i), "chosen": "c", "rejected": "d"}, {}, "g") for i in range(2000)]
    few = {i for i, row in enumerate(rows) if row.is_held_out(0.02)}
    many = {i for i, row in enumerate(others) if row.is_held_out(0.1)}
    assert 20 < len(few) < 70
    assert few < many
    assert not any(row.is_held_out(0.0) for row in rows)


RANKED = {"prompt": "say a", "chosen": "a", "rejected": "b"}


def test_what_a_reward_model_learns_stands_beside_the_pair():
    grades = {"chosen": {"truthfulness": 2, "verbosity": None}, "rejected": {"harmlessness": 0}, "edited": None}
    row = read_row({**RANKED, "edited": "A", "strength": "significantly", "grades": grades}, {}, "f:1")
    assert row.form == "pairs"
    assert (row.content["edited"], row.content["strength"]) == ("A", 4)
    assert row.content["grades"] == {"chosen": {"truthfulness": 2}, "rejected": {"harmlessness": 0}, "edited": {}}
    renamed = read_row({**RANKED, "level": 2}, {"strength": "level"}, "f:1")
    assert renamed.content["strength"] == 2


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"strength": 5}, r'"strength" is 5\. Give 1 \(negligibly\), 2 \(slightly\)'),
        ({"strength": "much"}, "\"strength\" is 'much'"),
        ({"strength": True}, '"strength" is True'),
        ({"edited": " "}, '"edited" is empty'),
        ({"grades": [1]}, '"grades" is a list'),
        ({"grades": {"other": {}}}, "\"grades\" has 'other'"),
        ({"grades": {"chosen": {"wit": 1}}}, '"grades" of chosen has wit 1. Give instruction_following'),
        ({"grades": {"chosen": {"verbosity": 3}}}, "verbosity 3. Give .* from 0 to 2"),
    ],
)
def test_malformed_judgements(field, says):
    with pytest.raises(UserError, match=says) as caught:
        read_row(RANKED | field, {}, "f:7")
    assert caught.value.where == "f:7"
