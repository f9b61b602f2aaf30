"""The store: whole or not there, never changed, safe for several processes and for killed ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.pipeline.config import StoreConfig, StoreSettings
from lightning_llm.pipeline.store import Store, read_record, size_of
from lightning_llm.pipeline.store_report import list_store, remove_from_store, verify_store
from lightning_llm.settings import UserError

KEY = "0123456789abcdef" * 4
ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def make(
    store: Store, content: bytes = b"some weights", key: str = KEY, name: str = "sft", again: bool = False
) -> Path:
    with store.claim("train", name, key, again=again) as claim:
        (claim.folder / "model").mkdir()
        (claim.folder / "model" / "weights").write_bytes(content)
        (claim.folder / "metrics.jsonl").write_text("{}\n")
        return claim.commit({"key": key, "created": "now"})


def test_what_was_made_is_found(store):
    path = make(store)
    assert path.name == f"train-sft-{KEY[:16]}"
    assert store.find("train", "sft", KEY) == path
    assert set(read_record(path)["files"]) == {"metrics.jsonl", "model/weights"}
    with store.claim("train", "sft", KEY) as claim:
        assert claim.found == path
    assert not list((store.root / ".making").iterdir())


def test_the_key_counts_and_not_the_name(store):
    assert store.find("train", "another_name", KEY) is None
    path = make(store)
    assert store.find("train", "another_name", KEY) == path
    assert store.find("train", "sft", KEY[:16] + "0" * 48) is None  # another key that begins alike


def interrupt(store):
    """Fail while an artifact is made that may be continued."""
    with contextlib.suppress(ZeroDivisionError), store.claim("generate", "sample", KEY, keeps=True) as claim:
        (claim.folder / "part").write_text("half")
        (claim.folder / "stage.json").write_text("{}")  # as if it was killed just before it was renamed
        raise ZeroDivisionError


def test_what_is_kept_is_continued_under_any_name(store):
    """A verb that goes on finds what a killed or failing process has left; what is whole leaves nothing behind."""
    interrupt(store)
    with store.claim("generate", "post1.sample", KEY, keeps=True) as claim:
        assert (claim.folder / "part").read_text() == "half"
        (claim.folder / "part").write_text("whole")
        artifact = claim.commit({"key": KEY})
    assert store.find("generate", "sample", KEY) == artifact
    assert not list((store.root / ".making").iterdir())
    with store.claim("generate", "sample", KEY, keeps=True, again=True) as claim:
        assert not list(claim.folder.iterdir())  # made again from the start
        assert (artifact / "part").read_text() == "whole"


def test_another_verb_begins_anew(store):
    interrupt(store)
    with store.claim("generate", "sample", KEY) as claim:
        assert not list(claim.folder.iterdir())


def test_an_error_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError), store.claim("train", "sft", KEY) as claim:
        (claim.folder / "half").write_text(f"half {1 / 0}")
    assert store.find("train", "sft", KEY) is None
    assert not list((store.root / ".making").iterdir())


def alter(path: Path, how: str) -> None:
    weights = path / "model" / "weights"
    if how == "same length":
        weights.write_bytes(b"SOME WEIGHTS")
    elif how == "shorter":
        weights.write_bytes(b"some")
    elif how == "missing":
        weights.unlink()
    elif how == "more":
        (path / "model" / "more").write_text("x")
    elif how == "no record":
        (path / "stage.json").unlink()
    elif how == "cut record":
        (path / "stage.json").write_text((path / "stage.json").read_text()[:40])
    elif how == "another record":
        (path / "stage.json").write_text((path / "stage.json").read_text().replace(KEY, KEY[::-1]))


@pytest.mark.parametrize(
    "how", ["same length", "shorter", "missing", "more", "no record", "cut record", "another record"]
)
def test_an_altered_artifact_is_never_used(store, how):
    path = make(store)
    alter(path, how)
    assert store.find("train", "sft", KEY) is None
    with store.claim("train", "sft", KEY) as claim:
        assert claim.found is None
        assert len(claim.lost) == 1
        (claim.folder / "weights").write_text("new")
        assert claim.commit({"key": KEY}) == path
    assert store.find("train", "sft", KEY) == path
    assert len(list((store.root / ".damaged").iterdir())) == 1


@settings(max_examples=25)
@given(contents=st.lists(st.binary(max_size=200), min_size=1, max_size=4), data=st.data())
def test_any_flipped_byte_is_seen(tmp_path_factory, contents, data):
    store = Store(tmp_path_factory.mktemp("store"))
    with store.claim("train", "sft", KEY) as claim:
        for i, content in enumerate(contents):
            (claim.folder / f"file{i}").write_bytes(content)
        path = claim.commit({"key": KEY})
    assert store.faults(path, KEY) == []
    assert store.faults(path, KEY, deep=True) == []
    full = [i for i, content in enumerate(contents) if content]
    if full:
        i = data.draw(st.sampled_from(full))
        place = data.draw(st.integers(0, len(contents[i]) - 1))
        changed = bytearray(contents[i])
        changed[place] ^= 1
        (path / f"file{i}").write_bytes(changed)
        assert store.faults(path, KEY, deep=True) == [f"file{i} has been altered"]


def test_a_content_is_hashed_once(store, monkeypatch):
    from lightning_llm.pipeline import store as module

    path, hashed = make(store), []
    sha256 = module._sha256
    monkeypatch.setattr(module, "_sha256", lambda file: hashed.append(file.name) or sha256(file))
    assert not store.faults(path, KEY)
    assert hashed == []
    os.utime(path / "model" / "weights")  # copied, touched: looked at again, and remembered
    assert not store.faults(path, KEY)
    assert not store.faults(path, KEY)
    assert hashed == ["weights"]


def test_what_is_made_again_takes_the_place_of_what_was_there(store):
    path = make(store, b"old")
    assert make(store, b"new", again=True) == path
    assert (path / "model" / "weights").read_bytes() == b"new"
    assert store.artifacts() == [path]
    with pytest.raises(RuntimeError), store.claim("train", "sft", KEY, again=True):
        raise RuntimeError
    assert store.find("train", "sft", KEY) == path  # what was there stays until the new one is whole


MAKER = """
import sys, time
from pathlib import Path
from lightning_llm.pipeline.store import Store
root, key = sys.argv[1:]
with Store(root).claim("train", "sft", key, waiting=lambda: print("waits", flush=True)) as claim:
    print("found" if claim.found else "makes", flush=True)
    if not claim.found:
        (claim.folder / "weights").write_text("half")
        while not Path(root, "go").exists():
            time.sleep(0.01)
        claim.commit({"key": key})
"""


def start(store: Store) -> subprocess.Popen:
    """A process that makes the key as soon as there is a file `go`."""
    words = [sys.executable, "-c", MAKER, str(store.root), KEY]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_two_processes_make_one_artifact(store):
    first = start(store)
    assert first.stdout.readline() == "makes\n"
    second = start(store)
    assert second.stdout.readline() == "waits\n"
    (store.root / "go").touch()
    assert second.communicate(timeout=20)[0] == "found\n"
    first.communicate(timeout=20)
    assert first.returncode == second.returncode == 0
    assert len(store.artifacts()) == 1


def test_a_killed_owner_is_replaced(store):
    owner = start(store)
    assert owner.stdout.readline() == "makes\n"
    while not list((store.root / ".making").glob("*/weights")):
        time.sleep(0.01)
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    assert store.find("train", "sft", KEY) is None
    path = make(store)
    assert not (path / "weights").exists()  # nothing of the half-written one
    assert not list((store.root / ".making").iterdir())


def test_what_is_being_read_is_neither_replaced_nor_removed(store):
    """Readers share; whoever would change it waits for the last one."""
    path = make(store, b"old")
    changes = (lambda: make(store, b"new", again=True), lambda: store.remove(path))
    for change, after in zip(changes, (b"new", None), strict=True):
        before = (path / "model" / "weights").read_bytes()
        changing = threading.Thread(target=change)
        with store.reading([KEY]), store.reading([KEY, "f" * 64]):
            changing.start()
            changing.join(0.5)
            assert changing.is_alive()
            assert (path / "model" / "weights").read_bytes() == before
        changing.join(20)
        assert not changing.is_alive()
        assert ((path / "model" / "weights").read_bytes() if path.is_dir() else None) == after


# ---- store list | verify | remove ----


@pytest.fixture
def settled(store, tmp_path) -> StoreSettings:
    """Two artifacts; a run refers to the first."""
    path = make(store)
    make(store, key="f" * 64, name="dpo")
    link = tmp_path / "runs" / "qwen2" / "one" / "artifacts" / "sft"
    link.parent.mkdir(parents=True)
    link.symlink_to(path)
    return StoreSettings(runs=str(tmp_path / "runs"), store=StoreConfig(str(store.root)))


def test_a_run_elsewhere_that_shares_the_store_counts(settled, store, tmp_path, capsys):
    run_folder = tmp_path / "of_a_colleague" / "qwen2" / "two"
    (run_folder / "artifacts").mkdir(parents=True)
    (run_folder / "artifacts" / "dpo").symlink_to(store.place("train", "dpo", "f" * 64))
    store.register(run_folder)
    assert list_store(settled) == 0
    assert "of_a_colleague/qwen2/two" in capsys.readouterr().out
    settled.names = ["ffff"]
    with pytest.raises(UserError, match="of_a_colleague/qwen2/two refers to it"):
        remove_from_store(settled)
    shutil.rmtree(run_folder)  # a run that is gone refers to nothing
    assert remove_from_store(settled) == 0


def test_list_says_who_refers_to_what(settled, store, capsys):
    assert list_store(settled) == 0
    dpo, sft, total = capsys.readouterr().out.splitlines()
    assert "train-sft" in sft
    assert sft.endswith("runs/qwen2/one")
    assert dpo.endswith("no run")
    assert "2 artifacts" in total
    assert size_of(store.artifacts()[0]) > 0


def test_verify_finds_what_was_altered(settled, store, capsys):
    assert verify_store(settled) == 0
    alter(store.place("train", "sft", KEY), "same length")
    assert verify_store(settled) == 1
    assert "model/weights has been altered" in capsys.readouterr().out


def test_remove_keeps_what_a_run_needs(settled, store):
    settled.names = [KEY[:8]]
    with pytest.raises(UserError, match=r"runs/qwen2/one.*force=true"):
        remove_from_store(settled)
    settled.force = True
    assert remove_from_store(settled) == 0
    assert [path.name for path in store.artifacts()] == [f"train-dpo-{'f' * 16}"]
    settled.names = ["nothing"]
    with pytest.raises(UserError, match="nothing: is the name of no artifact"):
        remove_from_store(settled)
    settled.names = []
    with pytest.raises(UserError, match="no artifact is named"):
        remove_from_store(settled)
