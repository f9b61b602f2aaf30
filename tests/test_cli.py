"""The command line: what it prints and returns, how soon it answers, and how a sweep ends."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_llm import __version__, cli

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-c", "import sys; from lightning_llm.cli import main; sys.exit(main())"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command line in this process, in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.command(list(words))
        return code, *capsys.readouterr()

    return run


ONE = """# @package _global_
defaults: [/model: qwen2_0_5b, /stage@stages.base: pretrain, _self_]
stages: {base: {tokens: 1e6, context: 128, batch_tokens: 1e3}}
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> list[str]:
    """A recipe of the user's own, of one stage: composed in no time."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "recipe").mkdir()
    (folder / "recipe" / "one.yaml").write_text(ONE)
    return ["--config-dir", str(folder), "recipe=one"]


def program(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*PROGRAM, *words], cwd=cwd, env=environment, capture_output=True, text=True)


# ---- the program ----


@pytest.mark.parametrize(
    ("words", "seconds", "shown"),
    [
        (["--version"], 1.2, __version__),
        (["--help"], 1.2, "run"),
        (["run", "--help"], 1.2, "qwen2_57b_a14b"),
        (["run", "recipe=qwen2", "--cfg", "job"], 2.0, "beta: 0.1"),
    ],
)
def test_it_answers_soon(words, seconds, shown, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = program(*words, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < seconds
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = program("run", "recipe=qwen2", "stages.dpo.objective.betta=0.05", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: command line: stages.dpo.objective.betta is not a setting of dpo. "
        "The nearest is beta (number, default 0.1).\n"
    )
    assert not list(tmp_path.iterdir())


# ---- verbs ----


def test_plan_in_figures(command, tmp_path):
    code, out, err = command("plan", "recipe=qwen2", "scale=paper", "format=json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    stages = {stage["name"]: stage for stage in plan["stages"]}
    for stage in plan["stages"]:
        assert {"kind", "objective", "starts_from", "tokens", "steps", "context", "parameters", "flops"} <= set(stage)
    assert stages["long_context"]["starts_from"] == "pretrain"
    assert stages["dpo"]["objective"] == "dpo"
    assert stages["pretrain"]["parameters"] == pytest.approx(7.616e9, rel=1e-3)
    # 6 N D of table 6 in the notes on the reports, and the attention's share on top
    total = sum(stages[name]["flops"] for name in ("pretrain", "long_context"))
    assert 1.0 < total / (6 * 7.07e9 * 7e12) < 1.15
    assert plan["flops"] == pytest.approx(sum(stage["flops"] for stage in plan["stages"]))
    assert not list(tmp_path.iterdir())


def test_a_tree_is_printed_only_if_it_is_right(command, mine):
    assert command("run", "--cfg", "job")[0] == 0
    code, out, err = command("run", "--cfg", "job", *mine, "+sed=1")
    assert (code, out) == (2, "")
    assert "seed" in err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["rnu"], ["rnu", "run"]),
        (["run"], ["recipe", "qwen2"]),
        (["run", "recipe=qwen"], ["qwen", "qwen2"]),
        (["store", "lits"], ["lits", "list"]),
        (["report"], ["no run is named"]),
        (["report", "nowhere"], ["nowhere", "no run folder"]),
        (["run", "--config-dir", "nowhere", "recipe=qwen2"], ["--config-dir", "nowhere"]),
        (["run", "recipe=qwen2", "--bogus"], ["--bogus"]),
        (["run", "recipe=qwen2", "--cfg", "jb"], ["jb", "job"]),
        (["store", "list", "store.rot=x"], ["store.rot", "root"]),
    ],
)
def test_other_mistakes(words, parts, command):
    code, out, err = command(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        (
            "scale/mine.yaml",
            "defaults: [nano, _self_]\nname: mine\nshapes: {policy: {hiden_size: 64}}\n",
            r"scale/mine\.yaml: scale\.shapes\.policy\.hiden_size .* hidden_size",
        ),
        (
            "recipe/mine.yaml",
            "# @package _global_\ndefaults: [qwen2, _self_]\nstages: {sft: {data: {sources: {web: {colums: {}}}}}}\n",
            r"recipe/mine\.yaml: stages\.sft\.data\.sources\.web\.colums .* columns",
        ),
        (
            "model/mine.yaml",
            "defaults: [qwen2_0_5b, _self_]\nrope_parameters: {rope_tehta: 1.0}\n",
            r"model/mine\.yaml: model\.rope_parameters\.rope_tehta .* rope_theta",
        ),
    ],
    ids=["scale", "recipe", "model"],
)
def test_a_mistake_in_a_file_of_the_users_own_names_the_file(file, content, line, command, tmp_path):
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(content)
    group = path.parent.name
    chosen = ["recipe=mine"] if group == "recipe" else ["recipe=qwen2", f"{group}=mine"]
    code, out, err = command("plan", "--config-dir", str(tmp_path), *chosen)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(line, err), err


def test_an_unknown_format(command, mine):
    code, out, err = command("plan", *mine, "format=jsn")
    assert (code, out, err) == (2, "", "error: format: is 'jsn'. Give text or json.\n")


def test_report_and_store_take_plain_words(command, run_folder, tmp_path):
    artifacts = (run_folder / "artifacts" / "sft").resolve().parent
    (tmp_path / "it's, a {run}").symlink_to(run_folder)
    code, out, _ = command("report", "it's, a {run}", str(run_folder), "output=page.html")
    assert (code, out.strip()) == (0, "page.html")
    assert (tmp_path / "page.html").is_file()
    code, out, _ = command("store", "list", f"store.root={artifacts}", f"runs={run_folder.parents[1]}")
    assert code == 0
    assert "train-sft" in out
    assert run_folder.name in out
    code, _, err = command("store", "remove", "no-such-thing", f"store.root={artifacts}")
    assert code == 2
    assert "no-such-thing" in err


@pytest.mark.parametrize(
    ("line", "shown"), [("lightning-llm ", "run plan report store"), ("lightning-llm run recipe=qw", "recipe=qwen2")]
)
def test_completion(line, shown, command, monkeypatch):
    monkeypatch.setenv("COMP_LINE", line)
    assert command("-sc", "query=bash")[1].strip() == shown


# ---- sweeps ----


def test_a_sweep_checks_all_jobs_first_and_runs_the_good_ones(command, mine):
    """One bad job neither stops the others nor hides."""
    code, out, err = command("plan", *mine, "-m", "seed=1,x")
    assert code == 2
    assert "seed 1:" in out
    assert "[1/2] recipe=one seed=1  done" in out
    assert err.count("seed cannot be 'x'") == 2  # before the first job, and in the list at the end
    assert "Traceback" not in err


def test_a_sweep_of_nothing_but_mistakes_runs_nothing(command, mine, tmp_path):
    code, out, err = command("run", "-m", *mine, "stages.base.lr.peek=1,2")
    assert (code, out) == (2, "")
    assert err.count("peak (number") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_over_seeds_trains_one_base_for_each(command, tiny, tmp_path):
    words = [word for word in tiny if not word.startswith("stages.long_context")]
    less = ["~stages.long_context", "stages.sft.starts_from=pretrain", "evaluation.questions=4"]
    code, _, err = command("run", "-m", "recipe=qwen2", *words, *less, "seed=0,1", "stages.dpo.objective.beta=0.05,0.1")
    assert code == 0, err
    made = [path.name.split("-")[1] for path in (tmp_path / "artifacts").glob("train*")]
    assert {name: made.count(name) for name in made} == {"pretrain": 2, "sft": 2, "dpo": 4}


def test_a_sweep_trains_what_its_jobs_share_once(run_folder, command, tmp_path):
    words = json.loads((run_folder / "run.json").read_text())["overrides"]
    words = [word for word in words if not word.startswith(("runs=", "scale=nano", "recipe="))]
    code, out, err = command("run", "-m", "recipe=qwen2", *words, "until=dpo", "stages.dpo.lr.peak=1e30,1e-9")
    assert code == 1  # one job failed, and not by a mistake of the user's
    assert "Traceback" in err
    assert [line[:5] for line in out.splitlines() if line.startswith("[")] == ["[2/2]"]
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/qwen2/*/run.json"))]
    assert sorted(record["status"] for record in records) == ["done", "failed"]
    for record in records:
        assert all(stage["reused"] for name, stage in record["stages"].items() if not name.startswith("dpo"))
