"""A fingerprint changes with the content and with nothing else."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from lightning_llm.data.config import SourceConfig
from lightning_llm.data.fingerprints import file_sha256, source_fingerprint
from lightning_llm.data.places import source_files
from lightning_llm.settings import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_hash_is_remembered_until_the_file_changes(tmp_path):
    file, cache = tmp_path / "a.txt", tmp_path / "sha256.json"
    file.write_text("one")
    assert file_sha256(file, cache) == hashlib.sha256(b"one").hexdigest()
    known = json.loads(cache.read_text())
    known[str(file.resolve())][3] = "remembered"
    cache.write_text(json.dumps(known))
    assert file_sha256(file, cache) == "remembered"
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert file_sha256(file, cache) == hashlib.sha256(b"two").hexdigest()


def test_content_decides_and_names_do_not(tmp_path):
    for name, content in {"a.txt": "x", "b.txt": "y", "c.txt": "x"}.items():
        (tmp_path / name).write_text(content)
    a, b, c = (source_fingerprint(SourceConfig(str(tmp_path / f"{name}.txt")), "s") for name in "abc")
    assert a == c != b


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert len(file_sha256(tmp_path / "file", tmp_path / "file" / "cache.json")) == 64


def test_embedded_text_is_known_by_its_packages():
    known = source_fingerprint(SourceConfig("embedded:docs"), "s")
    assert '"networkx"' in known
    assert '"python"' in known
    assert source_fingerprint(SourceConfig("hub:a/b", options={"revision": "f00"}), "s") == "hub:a/b@f00"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "data.sources.mine.path: names nothing"),
        ("embedded:cod", "Embedded are code, docs"),
        ("nowhere/*.jsonl", "there is no file nowhere"),
    ],
)
def test_a_source_that_is_not_there_is_named(path, message):
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        source_fingerprint(SourceConfig(path), "data.sources.mine")


def test_files_of_a_pattern_and_of_a_folder(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.csv", "d/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in source_files(str(tmp_path), "s")] == ["a.parquet", "b.jsonl", "e.txt"]
    assert [file.name for file in source_files(f"{tmp_path}/*.jsonl", "s")] == ["b.jsonl"]
    with pytest.raises(UserError, match=r"c\.csv: is of an unknown kind"):
        source_files(f"{tmp_path}/*.csv", "s")


@pytest.mark.filterwarnings("ignore")  # of the library
def test_saved_data_counts_by_its_files(tmp_path):
    """What it was saved with stays when a file is exchanged."""
    import datasets

    def saved(name, *texts):
        datasets.Dataset.from_list([{"text": text} for text in texts]).save_to_disk(str(tmp_path / name))
        return tmp_path / name

    a, b, c = saved("a", "x", "y"), saved("b", "x", "y"), saved("c", "x", "z")
    prints = {path.name: source_fingerprint(SourceConfig(str(path)), "s") for path in (a, b, c)}
    assert prints["a"] == prints["b"] != prints["c"]
    [file], [other] = a.glob("*.arrow"), c.glob("*.arrow")
    file.write_bytes(other.read_bytes())
    assert source_fingerprint(SourceConfig(str(a)), "s") == prints["c"]


def test_a_repository_on_this_machine_counts_by_its_files(tmp_path):
    folder = tmp_path / "repository"
    (folder / ".cache").mkdir(parents=True)
    (folder / "rows.jsonl").write_text("x")
    source = SourceConfig(f"hub:{folder}")
    before = source_fingerprint(source, "s")
    (folder / ".cache" / "when").write_text("now")
    assert source_fingerprint(source, "s") == before
    (folder / "rows.jsonl").write_text("y!")
    assert source_fingerprint(source, "s") != before


def test_compression_is_part_of_how_a_file_is_read(tmp_path):
    prints = set()
    for name in ("a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.zst"):
        (tmp_path / name).write_text("x")
        prints.add(source_fingerprint(SourceConfig(str(tmp_path / name)), "s"))
    assert len(prints) == 4
    # as it was before there were others: keys of artifacts hold it
    plain = "jsonl " + hashlib.sha256(b"x").hexdigest()
    assert "files:" + hashlib.sha256(plain.encode()).hexdigest() in prints
