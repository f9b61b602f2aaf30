"""Rows come out of every kind of source, and a malformed one names its file and line."""

from __future__ import annotations

import json

import pytest

from lightning_llm.data.config import SourceConfig
from lightning_llm.data.places import is_datasets_folder, source_options
from lightning_llm.data.rows import Row
from lightning_llm.data.sources import open_source
from lightning_llm.settings import UserError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


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


def test_a_folder_gives_its_rows_and_not_what_tells_about_them(tmp_path):
    for name in ("README.md", "data/a.jsonl", "data/.cache/b.jsonl", ".git/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text('{"text": "row"}')
    rows = list(open_source(SourceConfig(str(tmp_path)), "s").rows())
    assert [row.where for row in rows] == [f"{tmp_path}/data/a.jsonl:1"]
    (tmp_path / "data" / "a.jsonl").unlink()
    assert [row.where for row in open_source(SourceConfig(str(tmp_path)), "s").rows()] == [f"{tmp_path}/README.md"]
    (tmp_path / "README.md").unlink()
    with pytest.raises(UserError, match=r"s\.path: .* holds no file that can be read"):
        open_source(SourceConfig(str(tmp_path)), "s")


def test_options_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "row"}')
    for documents, message in (("page", "is 'page'. Choose one of file, paragraph"), ("file", "has no text files")):
        with pytest.raises(UserError, match=message):
            open_source(SourceConfig(str(tmp_path), options={"documents": documents}), "s")
    assert source_options(str(tmp_path), "s") == ("documents",)
    assert source_options("hub:a/b", "s") == ("split", "config", "revision")
    assert "split" in source_options("nothing/here", "s")  # what is missing is named later, and not its options


@pytest.mark.filterwarnings("ignore")  # of the library
def test_a_hub_is_read_from_the_commit_that_its_revision_is(monkeypatch):
    """The commit is asked for once and handed on; without a connection the revision is read as it is named."""
    import datasets
    import huggingface_hub

    asked, one = [], datasets.Dataset.from_list([{"text": "row"}]).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **named: asked.append((words, named)) or one)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda *words, **named: huggingface_hub.hf_api.DatasetInfo(id="a/b", sha="c0"),
    )
    config = SourceConfig("hub:a/b", options={"config": "small", "split": "test", "revision": "v1"})
    source = open_source(config, "s")
    assert source.commit == "c0"
    assert [row.content for row in source.rows() if isinstance(row, Row)] == [{"text": "row"}]
    assert asked == [(("a/b", "small"), {"split": "test", "revision": "c0", "streaming": True})]
    assert source.fingerprint == "hub:a/b@v1"  # a key does not depend on who can be reached
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_source(config, "s").commit is None


def test_columns_of_embedded_sources_are_refused():
    with pytest.raises(
        UserError, match=r"^s\.columns: is given, and the fields of embedded:tasks have our names already"
    ):
        open_source(SourceConfig("embedded:tasks", columns={"prompt": "question"}), "s")


@pytest.mark.filterwarnings("ignore")  # of the library
def test_a_split_of_saved_data_is_named(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"text": "row"}])
    datasets.DatasetDict({"one": rows, "two": rows}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"s\.options\.split: there is no split train in .*\. Take one, two"):
        open_source(SourceConfig(str(tmp_path / "both")), "s")
    two = open_source(SourceConfig(str(tmp_path / "both"), options={"split": "two"}), "s")
    assert [row.where for row in two.rows()] == [f"{tmp_path}/both/two two: row 1"]
    rows.save_to_disk(str(tmp_path / "whole"))
    whole = f"s.options.split: is nope, and {tmp_path}/whole was saved without splits. Leave it out: all rows are read."
    with pytest.raises(UserError) as caught:
        open_source(SourceConfig(str(tmp_path / "whole"), options={"split": "nope"}), "s")
    assert str(caught.value) == whole
    assert len(list(open_source(SourceConfig(str(tmp_path / "whole")), "s").rows())) == 1
    datasets.DatasetDict({"only": rows}).save_to_disk(str(tmp_path / "only"))
    assert len(list(open_source(SourceConfig(str(tmp_path / "only")), "s").rows())) == 1


@pytest.mark.filterwarnings("ignore")  # of the library
def test_damaged_folders_of_datasets_and_files_that_only_have_their_name(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"text": "row"}])
    rows.save_to_disk(str(tmp_path / "saved"))
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match=r"arrow: is named in .*state\.json and not there"):
        open_source(SourceConfig(str(tmp_path / "saved")), "s")
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [1]}')
    with pytest.raises(UserError, match=r"state\.json: names no files of data"):
        open_source(SourceConfig(str(tmp_path / "saved")), "s")
    for content in ("{}", "no JSON", "[]"):  # of another program's, beside rows
        (tmp_path / "rows").mkdir(exist_ok=True)
        (tmp_path / "rows" / "state.json").write_text(content)
        (tmp_path / "rows" / "rows.jsonl").write_text('{"text": "row"}\n')
        source = SourceConfig(str(tmp_path / "rows" / "*.jsonl"))
        assert [row.content for row in open_source(source, "s").rows()] == [{"text": "row"}]
        assert not is_datasets_folder(tmp_path / "rows")


def test_an_array_of_large_rows_is_read_piece_by_piece(tmp_path):
    texts = [f"{number}" * length for number, length in enumerate((3, 300_000, 5, 70_000))]
    file = tmp_path / "rows.json"
    file.write_text("\ufeff\n [\n" + ",\n".join(json.dumps({"text": text}) for text in texts) + "\n]\n", "utf-8")
    rows = list(open_source(SourceConfig(str(file)), "s").rows())
    assert [row.content["text"] for row in rows if isinstance(row, Row)] == texts
    assert [row.where for row in rows] == [f"{file}:{line}" for line in (3, 4, 5, 6)]


def test_text_of_a_table_that_is_no_text_is_one_malformed_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.array([b"one", b"\xff", b"three"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "rows.parquet")
    first, second, third = open_source(SourceConfig(str(tmp_path)), "s").rows()
    assert isinstance(second, UserError)
    assert "rows.parquet: row 2: cannot be read" in str(second)
    assert [row.content["text"] for row in (first, third) if isinstance(row, Row)] == ["one", "three"]
