"""Mistakes that Hydra words for itself, through the real command line: one line that says what to type, exit code 2."""

from __future__ import annotations

import pytest

from lightning_llm import cli

ONE = """# @package _global_
defaults: [/model: qwen2_0_5b, /stage@stages.base: pretrain, _self_]
stages: {base: {tokens: 1e6, context: 128, batch_tokens: 1e3}}
"""
FILES = {
    "one": ONE,
    "circle": "# @package _global_\ndefaults: [circle, _self_]\n",
    "group": ONE.replace("/model:", "/modell:"),
    "twice": ONE.replace("defaults: [", "defaults: [/model: qwen2_7b, "),
    "early": ONE.replace("/model:", "override /model:"),
    "number": ONE + "evaluation: 3\n",
}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder of the user's own; one of its folders is named like a file."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "recipe" / "a_folder.yaml").mkdir(parents=True)
    for name, text in FILES.items():
        (folder / "recipe" / f"{name}.yaml").write_text(text)
    (folder / "recipe" / "latin.yaml").write_bytes(b"# caf\xe9\n" + ONE.encode())
    return folder


def complaint(words, capsys) -> str:
    assert cli.command(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    return err


# what is typed behind `plan --config-dir mine` -> what the line must name
TYPED = {
    "recipe=circle": ["command line", "recipe=circle", "circle."],
    "recipe=group": ["recipe/group.yaml", "no group modell", "The nearest is model"],
    "recipe=twice": ["that recipe=twice chooses", "model is chosen twice", "override"],
    "recipe=early": ["recipe/early.yaml", "Override 'model"],
    "recipe=number": ["recipe/number.yaml", "evaluation cannot be 3"],
    "recipe=latin": ["recipe/latin.yaml:1", "0xe9", "UTF-8"],
    "recipe={a: 1}": ["recipe chooses a file", "recipe=NAME"],
    "recipe=/etc/passwd": ["command line", "/etc"],
    "recipe=one stages.base.optimizer=lion": ["lion. Choose it with optimizer@stages.base.optimizer=lion"],
    "recipe=one stages.base.data=own_text": ["data@stages.base.data=own_text"],
    "recipe=one stages.base.lr=cosine": ["schedule@stages.base.lr=cosine"],
    "recipe=one stages.base.optimizer=adamww": ["cannot be adamww", "several settings"],
    "recipe=one stages.base.optimizer.online_merging=null": ["cannot be null", "several settings: method, base"],
    "recipe=one stages=[]": ["stages cannot be a list", "several settings"],
    "recipe=one scale.shapes.policy=3": ["scale.shapes.policy cannot be 3", "several settings"],
    "recipe=one until=[base]": ["until cannot be a list. It is text"],
    "recipe=one +logger=wandb": ["logger is chosen already", "logger=wandb, without the +"],
    "recipe=one ~stages.base=x": ["stages.base is several settings, not x", "~stages.base"],
}


@pytest.mark.parametrize("typed", TYPED)
def test_what_hydra_says_is_said_in_our_words(typed, mine, capsys):
    # a mapping in braces is one word
    words = [typed] if "{" in typed else typed.split(" ")
    said = complaint(["plan", "--config-dir", str(mine), *words], capsys)
    for part in TYPED[typed]:
        assert part in said
    assert len(said) < 400


def test_a_verb_that_chooses_no_files_offers_none(capsys):
    assert "The nearest" not in complaint(["report", "sed=1"], capsys)


def test_a_file_of_the_users_own_that_ours_would_hide(tmp_path, capsys):
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale" / "nano.yaml").write_text("context: 96\n")
    said = complaint(["plan", "--config-dir", str(tmp_path), "recipe=qwen2"], capsys)
    assert f"{tmp_path}/scale/nano.yaml: has the name of a file that comes with this program" in said
