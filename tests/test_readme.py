"""The README runs as written: cheap commands for real, `run` as the plan it would execute, Python up to what trains."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_llm import cli, compose, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
PROGRAM = [sys.executable, "-c", "import sys; from lightning_llm.cli import main; sys.exit(main())"]


def test_every_page_of_a_method_is_linked_and_every_recipe_named():
    pages = set(re.findall(r"\]\((docs/methods/\w+\.md)[)#]", README))
    assert pages == {f"docs/methods/{path.name}" for path in (ROOT / "docs" / "methods").glob("*.md")}
    named = set(re.findall(r"`recipe=(\w+)", README))
    assert named == {path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml")}


def test_the_readers_path_is_as_long_as_it_says():
    path = re.findall(r"^\| \[([\w/.]+)\]\(\1\) \|", README, re.MULTILINE)
    lines = sum(len((ROOT / name).read_text("utf-8").splitlines()) for name in path)
    said = int(re.search(r"Some ([\d,]+) lines show", README)[1].replace(",", ""))
    assert len(path) == 8
    assert abs(lines - said) <= 100


def arguments(line: str) -> list[str]:
    return shlex.split(line, comments=True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, run_folder, tiny):
    """Where the README's user works: the YAML files and the data it shows, and two runs."""
    place = tmp_path_factory.mktemp("readme")
    for kind, block in BLOCKS:
        if kind == "yaml":
            path = place / next(line[2:] for line in block.splitlines() if line.startswith("# mine/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block, encoding="utf-8")
        elif kind == "json":
            rows = block.splitlines()
            (place / "chats.jsonl").write_text("\n".join(row for row in rows if "messages" in row), encoding="utf-8")
            (place / "pairs.jsonl").write_text("\n".join(row for row in rows if "chosen" in row), encoding="utf-8")
    (place / "texts").mkdir()
    (place / "runs" / "qwen2").mkdir(parents=True)
    (place / "runs" / "qwen2" / run_folder.name).symlink_to(run_folder)
    (place / "artifacts").mkdir()
    for link in (run_folder / "artifacts").iterdir():  # of this run alone: others may share its store
        artifact = link.resolve()
        if not (place / "artifacts" / artifact.name).exists():
            (place / "artifacts" / artifact.name).symlink_to(artifact)
    # the README's sweep over beta leaves a second artifact of dpo, before its user asks for `model=dpo`
    here = [f"store.root={place}/artifacts", f"runs={place}/runs", "stages.dpo.objective.beta=0.05"]
    run(compose("qwen2", overrides=[*tiny, *here]), only="dpo")
    assert len(list((place / "artifacts").glob("train-dpo-*"))) == 2
    return place


def chat(folder: Path, *words: str) -> tuple[int, str, str]:
    """A chat of one line, in a process of its own, which it may set signals in: (exit code, output, errors)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*PROGRAM, "chat", *words], cwd=folder, env=environment, input="hello\n", capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("lightning-llm")])
def test_commands_run_as_written(line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    verb, *rest = arguments(line)[1:]
    words = [str(path) for word in rest for path in (sorted(folder.glob(word)) if word.endswith("/*") else [word])]
    if verb == "chat":
        code, out, err = chat(folder, *words)
    else:
        code = cli.command(["plan" if verb == "run" else verb, *words])
        out, err = capsys.readouterr()
    assert code == 0, err
    assert out.strip() or (out and verb in ("generate", "chat"))  # the tiny model may say blanks


def test_make_knows_the_targets():
    for line in COMMANDS:
        if line.startswith("make"):
            subprocess.run(["make", "--dry-run", *arguments(line)[1:]], cwd=ROOT, check=True, capture_output=True)


def test_python_runs_up_to_what_trains(folder, monkeypatch, capsys):
    """The last statement trains: its arguments are checked against the function, all before it is executed."""
    [block] = [block for kind, block in BLOCKS if kind == "python"]
    *before, last = ast.parse(block).body
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(ast.Module(before, []), "README.md", "exec"), names)
    assert "dpo" in capsys.readouterr().out
    assert isinstance(last, ast.Assign)
    assert isinstance(last.value, ast.Call)
    call = last.value
    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    inspect.signature(names["run"]).bind(names["recipe"], **given)


def test_rows_shown_are_rows(tmp_path):
    from lightning_llm.data.config import SourceConfig
    from lightning_llm.data.sources import open_source

    [block] = [block for kind, block in BLOCKS if kind == "json"]
    forms = []
    for number, line in enumerate(block.splitlines()):
        json.loads(line)
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line + "\n", encoding="utf-8")
        [row] = open_source(SourceConfig(path=str(path)), "data.sources.mine").rows()
        assert not isinstance(row, Exception), row
        forms.append(row.form)
    assert forms == ["text", *["conversations"] * 4, "pairs"]


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []
