"""Rows of every form come out in one shape, and a malformed one names its file and line."""

from __future__ import annotations

import json

import pytest

from lightning_llm.data.config import SourceConfig
from lightning_llm.data.rows import Row, read_row
from lightning_llm.data.sources import open_source
from lightning_llm.settings import UserError

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


def test_jsonl_names_file_and_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n{"text": "b"\n{"text": "\xff"}\n[]\n{"text": "c"}')
    rows = list(open_source(SourceConfig(str(file)), "data.sources.mine").rows())
    assert [row.where.removeprefix(str(file)) for row in rows] == [":1", ":3", ":4", ":5", ":6"]
    assert [row.what for row in rows if isinstance(row, UserError)] == [
        "is not JSON (Expecting ',' delimiter at column 13)",
        "is not UTF-8",
        "is a list and not an object with fields",
    ]


def test_lines_that_json_takes_and_nothing_else_does_are_malformed_rows(tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_text('{"text": "a \\ud800"}\n{"text": ' + "9" * 5000 + "}\n" + "[" * 100_000 + '\n{"text": "fine"}\n')
    found = list(open_source(SourceConfig(str(file)), "data.sources.mine").rows())
    assert [isinstance(row, UserError) for row in found] == [True, True, True, False]
    assert [row.where for row in found] == [f"{file}:{line}" for line in (1, 2, 3, 4)]
    assert "half a character" in str(found[0])


def test_a_pair_may_repeat_its_prompt_and_nothing_else():
    prompt = [{"role": "user", "content": "hi"}]
    answer = {"role": "assistant", "content": "yes"}
    row = {"prompt": "hi", "chosen": [*prompt, answer], "rejected": [answer]}
    assert read_row(row, {}, "x:1").content == {"prompt": prompt, "chosen": "yes", "rejected": "yes"}
    other = [{"role": "user", "content": "ho"}, answer]
    with pytest.raises(UserError, match='x:1: "chosen" has turns before its answer'):
        read_row({**row, "chosen": other}, {}, "x:1")


def test_columns_are_renamed_and_rows_are_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"body": str(i), "text": None}) + "\n" for i in range(5)))
    config = SourceConfig(str(file), columns={"text": "body"}, max_rows=3)
    assert [row.content["text"] for row in open_source(config, "s").rows() if isinstance(row, Row)] == ["0", "1", "2"]
    [first, *_] = open_source(SourceConfig(str(file), columns={"text": "bodi"}), "s").rows()
    assert isinstance(first, UserError)
    assert 'no field "bodi" (found: body, text)' in str(first)


def test_a_text_file_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("two\nlines")
    (tmp_path / "b.md").write_bytes(b"\xff")
    good, bad = open_source(SourceConfig(str(tmp_path)), "s").rows()
    assert isinstance(good, Row)
    assert good.content == {"text": "two\nlines"}
    assert "b.md: is not UTF-8 (byte 0)" in str(bad)


@pytest.mark.filterwarnings("ignore")  # of the libraries that read it
def test_parquet_names_file_and_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["hi", "hi"], "completion": ["ho", ""]}), file)
    good, bad = open_source(SourceConfig(str(file)), "s").rows()
    assert isinstance(good, Row)
    assert good.content == {"messages": [USER, ASSISTANT]}
    assert f'{file}: row 2: "completion" is empty' in str(bad)
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"rows\.parquet: cannot be read as parquet"):
        list(open_source(SourceConfig(str(file)), "s").rows())


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub:nobody/nothing cannot be read"):
        list(open_source(SourceConfig("hub:nobody/nothing"), "data.sources.mine").rows())


def test_embedded_sources_make_what_is_asked():
    tasks = SourceConfig("embedded:tasks", options={"task": "sort", "questions": 5})
    rows = [row for row in open_source(tasks, "s").rows(["validation"]) if isinstance(row, Row)]
    assert len(rows) == 5
    assert all(row.content["task"] == "sort" and row.is_held_out(0.0) for row in rows)
    pairs = open_source(SourceConfig("embedded:preferences", options={"rows": 6, "held_out": 2}), "s").rows()
    assert [row.split for row in pairs if isinstance(row, Row)] == 6 * ["train"] + 2 * ["validation"]
    with pytest.raises(UserError, match=r"s\.options\.size: is not an option.*held_out, multi_turn"):
        list(open_source(SourceConfig("embedded:instructions", options={"size": 3}), "s").rows())
    with pytest.raises(UserError, match="no task"):
        list(open_source(SourceConfig("embedded:tasks", options={"task": "sing"}), "s").rows())


def test_the_split_is_one_for_all_and_goes_by_the_prompt():
    rows = [read_row({"prompt": str(i), "chosen": "a", "rejected": "b"}, {}, "f") for i in range(2000)]
    others = [read_row({"prompt": str(i), "chosen": "c", "rejected": "d"}, {}, "g") for i in range(2000)]
    few = {i for i, row in enumerate(rows) if row.is_held_out(0.02)}
    many = {i for i, row in enumerate(others) if row.is_held_out(0.1)}
    assert 20 < len(few) < 70
    assert few < many
    assert not any(row.is_held_out(0.0) for row in rows)
