"""Every command of the pages on methods is one, and so is what README's table of methods says is typed: what they run
is planned as it is printed there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_llm.cli import command

PAGES = sorted((Path(__file__).parents[1] / "docs" / "methods").glob("*.md"))
CONTINUED = r"(?:.*\\\n)*.*"  # a line, with those before it that end in a backslash
INDENTED = re.compile(rf"^ {{4,}}lightning-llm (?:run|plan) {CONTINUED}", re.MULTILINE)
COMMANDS = {
    f"{page.stem}: {' '.join(found.split())}": shlex.split(found.replace("\\\n", " "), comments=True)
    for page in PAGES
    for found in INDENTED.findall(page.read_text("utf-8"))
}
README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
TYPED = [
    typed
    for row in re.findall(r"^\| .*\]\(docs/methods/.*$", README, re.MULTILINE)
    for typed in re.findall(r"`(recipe=[^`]*)`", row)
]
COMMANDS |= {f"README: {typed}": ["lightning-llm", "run", *shlex.split(typed)] for typed in TYPED}


def test_pages_have_commands():
    assert len(TYPED) > 12
    assert len(COMMANDS) > 25
    named = {name.partition(":")[0] for name in COMMANDS}
    assert named >= {"judges", "online_dpo", "rejection_sampling", "reward_models", "warp"}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_commands_plan_as_printed(words, talker, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("FOLDER", "START", "A", "B"):  # models of elsewhere, as the pages call them
        (tmp_path / name).symlink_to(talker)
    program, _, *rest = words
    assert program == "lightning-llm"
    assert command(["plan", *rest]) == 0, capfd.readouterr().err
    assert "total:" in capfd.readouterr().out
