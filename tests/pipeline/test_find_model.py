"""A model by its folder, its name or its key; what is none, or several, is said in one line."""

import pytest

from lightning_llm.pipeline.find_model import find_model
from lightning_llm.pipeline.store import Store
from lightning_llm.settings import UserError

KEYS = {"sft": "aa" + "1" * 30, "dpo": "ab" + "2" * 30, "dpo.evaluate": "ac" + "3" * 30}


@pytest.fixture
def store(tmp_path):
    """Two models and an evaluation."""
    store = Store(tmp_path / "artifacts")
    for name, key in KEYS.items():
        kind = "evaluate" if "." in name else "train"
        with store.claim(kind, name, key) as claim:
            if kind == "train":
                (claim.folder / "model").mkdir()
                (claim.folder / "model" / "config.json").write_text("{}")
            claim.commit({"key": key})
    return store


def test_by_folder(store, tmp_path):
    [model] = store.root.glob("train-sft-*")
    link = tmp_path / "link"
    link.symlink_to(model)
    for path in (model, model / "model", link):
        assert find_model(str(path), store).resolve() == model / "model"


@pytest.mark.parametrize("name", ["dpo", "train-dpo", f"train-dpo-{KEYS['dpo'][:16]}", "ab", KEYS["dpo"][:16]])
def test_by_name_or_key(name, store):
    assert find_model(name, store) == store.root / f"train-dpo-{KEYS['dpo'][:16]}" / "model"


def test_what_is_none_or_several(store, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        find_model(str(tmp_path / "empty"), store)
    with pytest.raises(UserError, match="nearest is train-dpo"):
        find_model("train-dop", store)
    with pytest.raises(UserError, match=r"may be any of train-dpo-ab.*, train-sft-aa"):
        find_model("a", store)


def test_of_one_stages_artifacts_the_one_that_a_run_took_last(store, tmp_path):
    """Not the one that was made last: a run takes what another made before."""
    [first] = store.root.glob("train-dpo-*")
    with store.claim("train", "dpo", "ad" + "4" * 30) as claim:
        (claim.folder / "model").mkdir()
        (claim.folder / "model" / "config.json").write_text("{}")
        second = claim.commit({"key": claim.key})
    said = []
    for number, taken in enumerate((second, first, second)):
        run = tmp_path / f"run{number}"
        (run / "artifacts").mkdir(parents=True)
        (run / "artifacts" / "dpo").symlink_to(taken)
        store.register(run)
        assert find_model("dpo", store, said.append) == taken / "model"
    other = first.name
    assert said[-1] == f"model dpo is {second.name}, which a run took last; there is also {other}"
    assert find_model(other, store, said.append) == first / "model"
    assert len(said) == 3  # by a name of its own there is nothing to say


def test_a_run_is_several(store, tmp_path):
    links = tmp_path / "run" / "artifacts"
    links.mkdir(parents=True)
    for name in ("sft", "dpo"):
        (links / name).symlink_to(next(store.root.glob(f"train-{name}-*")))
    with pytest.raises(UserError, match=r"is a run.*artifacts/dpo, .*artifacts/sft"):
        find_model(str(tmp_path / "run"), store)
    assert find_model(str(links / "sft"), store).resolve().parent.name.startswith("train-sft")


def test_a_damaged_artifact_is_not_used(store):
    path = find_model("sft", store)
    (path / "config.json").write_text('{"altered": 1}')
    with pytest.raises(UserError, match="is damaged"):
        find_model("sft", store)
