"""The command line: what it prints and returns, how soon it answers, and how a sweep ends."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import re
import resource
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_llm import __version__, cli
from lightning_llm.generation.chat import COMMANDS, Conversation
from lightning_llm.generation.config import GenerationConfig
from lightning_llm.generation.speaker import load_speaker
from lightning_llm.pipeline.composition import compose_tree
from lightning_llm.pipeline.config import ChatSettings, GenerateSettings
from lightning_llm.pipeline.reader import build_settings
from lightning_llm.stages.config import ComputeConfig

ROOT = Path(__file__).parents[1]
# what generate and chat say first, on stderr
ATTENTION = "note: attention by sdpa (the fastest on a CPU, and trains), new tokens by torch's products\n"
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
    ("words", "imports", "shown"),
    [
        (["--version"], 5, __version__),
        (["--help"], 5, "run"),
        (["run", "--help"], 5, "qwen2_57b_a14b"),
        (["generate", "--help"], 5, "top_k"),
        (["generate", "model=a", "prompt=b", "--cfg", "job"], 15, "max_new_tokens: 256"),
        (["run", "recipe=qwen2", "--cfg", "job"], 15, "beta: 0.1"),
    ],
)
def test_it_answers_soon(words, imports, shown, tmp_path):
    """In imports of Hydra by this machine: about a second where one takes .13. Torch would take a dozen more."""
    hydra = [sys.executable, "-c", "import hydra.main"]
    both = [(_cpu_seconds([*PROGRAM, *words], shown, tmp_path), _cpu_seconds(hydra, "", tmp_path)) for _ in range(3)]
    taken, unit = (min(each) for each in zip(*both, strict=True))
    assert taken < imports * unit
    assert not list(tmp_path.iterdir())


def _cpu_seconds(command, shown, cwd):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", [[], ["--resolve"], ["-p", "stages.dpo"], ["-p", "seed"], ["-p", "_global_"]])
def test_cfg_job_prints_what_hydra_prints(words, command, tmp_path):
    hydra = "from hydra import main; main(config_path=sys.argv.pop(1), config_name='run', version_base='1.3')(print)()"
    register = "import sys; from lightning_llm.pipeline.composition import CONF, register_schemas; register_schemas()"
    asked = ["recipe=qwen2", "--cfg", "job", *words]
    python = [sys.executable, "-c", f"{register}; {hydra}", str(ROOT / "conf"), *asked]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    theirs = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert theirs.stdout
    assert command("run", *asked) == (0, theirs.stdout, "")


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
        (["report"], ["no run is named", "lightning-llm report runs/qwen2/*."]),
        (["report", "nowhere"], ["nowhere", "no run folder"]),
        (["run", "--config-dir", "nowhere", "recipe=qwen2"], ["--config-dir", "nowhere"]),
        (["plan", "recipe=qwen2", "evaluation.questions=8000"], ["evaluation.questions", "2000 of each", "of sum"]),
        (["plan", "recipe=qwen2", "evaluation.questions=-1"], ["evaluation.questions", "at least 0"]),
        (["plan", "recipe=qwen2", "evaluation.tasks.sources.sum.options.task=summ"], ["options.task", "summ", "sum"]),
        (["run", "recipe=qwen2", "--bogus"], ["--bogus"]),
        (["run", "recipe=qwen2", "--cfg", "jb"], ["jb", "job"]),
        (["run", "recipe=qwen2", "--config-name=plan"], ["--config-name", "run has its own", "--config-dir"]),
        (["plan", "--config-path", "/tmp", "recipe=qwen2"], ["--config-path", "plan has its own", "--config-dir"]),
        (["plan", "--config-na", "run", "recipe=qwen2"], ["--config-na"]),
        (["plan", "recipe=qwen2", "--resolve"], ["--resolve", "--cfg job"]),
        (["plan", "recipe=qwen2", "--package", "model"], ["--package", "--cfg job"]),
        (["plan", "recipe=qwen2", "--package"], ["--package", "has no value"]),
        (["plan", "recipe=qwen2", "--cfg", "job", "-p", "model.hiden_size"], ["model.hiden_size", "is hidden_size"]),
        (["plan", "recipe=qwen2", "--multirun", "--cfg", "job"], ["--multirun and --cfg"]),
        (["plan", "recipe=qwen2", "--experimental-rerun", "x"], ["--experimental-rerun", "same command"]),
        (["plan", "recipe=qwen2", "+sed=1", "--info", "config"], ["sed", "seed"]),
        (["--shell-completion"], ["--shell-completion", "install=bash"]),
        (["plan", "-sc", "install=sh"], ["-sc", "install=bash"]),
        (["-sc", "query=bash"], ["-sc install=bash"]),
        (["generate", "model=.", "prompt=a", "recipe=qwen2"], ["recipe is not a setting of generate", "run and plan"]),
        (["generate", "model=.", "prompt=a", "batch_size=0"], ["batch_size", "at least 1"]),
        (["generate", "model=.", "prompt=a", "compute.precision=fp8"], ["compute.precision", "bf16, fp32"]),
        (["run", "recipe=qwen2", "runs=file/runs"], ["runs: ", "file/runs cannot be a folder"]),
        (["run", "recipe=qwen2", "store.root=file"], ["store.root: ", "file cannot be a folder"]),
        (["run", "recipe=qwen2", "store.root=/proc/none"], ["store.root: ", "/proc/none cannot be made (No such file"]),
        (["store", "list", "store.root=file"], ["store.root: ", "file cannot be a folder"]),
        (["store", "list", "force=[a]"], ["force cannot be ['a']", "true or false"]),
        (["plan", "recipe=qwen2", "stages.sft.optimizer.betas=[a,0]"], ["betas[0] cannot be 'a'", "number"]),
        (["chat", "prompt=y"], ["chat takes no prompt", "generate takes prompt=TEXT"]),
        (["plan", "recipe=qwen2", "force=[dpo]"], ["force is not a setting of plan", "belongs to run and store"]),
        (["plan", "recipe=qwen2", "limits.hours=1"], ["limits is not a setting of plan", "belongs to run."]),
        (["run", "recipe=null"], ["recipe cannot be null", "qwen2"]),
        (["store", "list", "store.rot=x"], ["store.rot", "root"]),
        (["generate", "prompt=a"], ["model", "is missing"]),
        (["generate", "model=."], ["prompt", "is missing"]),
        (["generate", "model=nowhere", "prompt=a"], ["nowhere", "artifacts"]),
        (["generate", "model=.", "prompt=a", "temprature=1"], ["temprature", "temperature"]),
        (["generate", "model=.", "prompt=a", "temperature=-1"], ["temperature: must be at least 0"]),
        (["chat", "model=."], ["holds no model"]),
        (["chat", "model=.", "dual_chunk.chunk_size=8", "dual_chunk.local_size=8"], ["dual_chunk.local_size"]),
    ],
)
def test_other_mistakes(words, parts, command, tmp_path):
    (tmp_path / "file").touch()
    code, out, err = command(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    for part in parts:
        assert part in err


def test_hydras_own_help(tmp_path):
    done = program("plan", "--hydra-help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--multirun" in done.stdout


@pytest.mark.parametrize("words", [["--info", "recipe=one"], ["recipe=one", "--info"]])
def test_information_takes_no_override_for_its_topic(words, mine, tmp_path):
    done = program("plan", *mine[:2], *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "recipe/one" in done.stdout


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            b"name: adamw\nweigth_decay: 0.2\n",
            ["mine.yaml: stages.base.optimizer.weigth_decay", "weight_decay (number"],
        ),
        (b"name: muon\nmomentum: 0.9\n", ["mine.yaml: stages.base.optimizer.momentum", "muon", "[muon, _self_]"]),
        (b"name: adamw\nbetas_: [0.9]\n", ["mine.yaml: stages.base.optimizer.betas_", "betas of", ", _self_]"]),
        (b"name: adamw\nweight_decay: 0.2\n", ["mine.yaml: stages.base.optimizer", "of no kind", "[adamw, _self_]"]),
        (b"name: adamw\n# caf\xe9\n", ["mine.yaml:2: is not UTF-8 (byte 0xe9)", "Save the file as UTF-8"]),
    ],
)
def test_an_optimizer_of_the_users_own_without_defaults(content, parts, command, tmp_path):
    for name, text in (("recipe/one", ONE.encode()), ("optimizer/mine", content)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.yaml").write_bytes(text)
    chosen = ["recipe=one", "optimizer@stages.base.optimizer=mine"]
    code, out, err = command("plan", "--config-dir", str(tmp_path), *chosen)
    assert (code, out, err.count("\n")) == (2, "", 1)
    for part in parts:
        assert part in err


@pytest.mark.parametrize("text", [ONE.partition("\n")[2], "defaults: [qwen2, _self_]\nstages: {sft: {examples: 5}}\n"])
def test_a_recipe_of_the_users_own_without_its_first_line(text, command, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "two.yaml").write_text(text)
    code, out, err = command("plan", "--config-dir", str(tmp_path), "recipe=two")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: recipe/two.yaml: lacks its first line")
    assert "`# @package _global_`" in err


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
        ("recipe/mine.yaml", "# @package _global_\n- a\n", r"recipe/mine\.yaml: what it says cannot be a list"),
        ("recipe/mine.yaml", "# @package _global_\ndefaults: qwen2\n", r"recipe/mine\.yaml: its defaults are no list"),
        (
            "recipe/mine.yaml",
            "# @package _global_\ndefaults: [qwen2, {override /model: qwen2_7}, _self_]\n",
            r"recipe/mine\.yaml: qwen2_7 is not an option of model\. The nearest is qwen2_7b",
        ),
        ("logger/mine.yaml", "name: mine\n", r"logger/mine\.yaml: lacks its first line.* `# @package logger\.mine`"),
    ],
    ids=["scale", "recipe", "model", "list", "defaults", "override", "logger"],
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


def test_examples_of_the_users_own_are_counted_and_corrected(run_folder, command, tmp_path):
    """The plan says that it estimates, the run says by how much, and what it advises is right."""
    (tmp_path / "artifacts").mkdir()
    for artifact in {link.resolve() for link in (run_folder / "artifacts").iterdir()}:  # a store of its own, for
        (tmp_path / "artifacts" / artifact.name).symlink_to(artifact)  # others count on what is in the run's
    given = [f"say {number} over and over: " + "twenty words and one " * 8 for number in range(60)]
    rows = [json.dumps({"prompt": prompt, "completion": "so it is said"}) for prompt in given]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    words = json.loads((run_folder / "run.json").read_text())["overrides"]
    words = [word for word in words if not word.startswith(("runs=", "store.root=", "stages.sft.examples"))]
    words += ["data@stages.sft.data=own_conversations", "stages.sft.data.sources.mine.path=mine.jsonl"]
    words += ["stages.sft.examples=30", "stages.sft.epochs=4"]
    code, out, _ = command("plan", *words)
    assert code == 0
    assert "sft: 30 examples are taken for 37 tokens each, as those of scale nano are; the run measures mine" in out
    assert "dpo: " not in out  # its rows are the scale's own
    code, _, err = command("run", *words, "only=sft")
    assert code == 0, err
    [(tokens, count, each, advice)] = re.findall(
        r"\] sft  ([\d,]+) tokens are about (\d+) rows of (\d+) tokens, not 120 of 37; .*: (\S+)", err
    )
    made = json.loads(max(tmp_path.glob("runs/*/*/artifacts/sft.prepare/prepare.json")).read_text())
    train = made["sources"]["mine"]["splits"]["train"]
    assert int(each) == round(train["tokens"] / train["rows"])
    assert int(tokens.replace(",", "")) == 120 * 37
    assert int(count) == round(120 * 37 * train["rows"] / train["tokens"])
    code, out, _ = command("plan", *words, advice)
    assert "examples are taken" not in out
    code, _, err = command("run", *words, "only=sft", advice)
    assert code == 0, err
    assert "tokens are about" not in err


@pytest.mark.parametrize(
    ("line", "shown"),
    [("lightning-llm ", "run plan report generate chat store"), ("lightning-llm run recipe=qw", "recipe=qwen2")],
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


def test_a_sweep_that_cannot_be_read(command, mine):
    code, out, err = command("plan", "-m", *mine, "seed=range(1,3,0)")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the sweep cannot be read" in err


def test_a_sweep_of_nothing(command, mine):
    code, out, err = command("plan", "-m", *mine, "seed=range(0)")
    assert (code, out, err) == (
        2,
        "",
        "error: command line: the sweep has no jobs. Give each key a value, as seed=0,1.\n",
    )


@pytest.mark.slow
def test_a_sweep_over_seeds_trains_one_base_for_each(command, tiny, tmp_path):
    words = [word for word in tiny if not word.startswith("stages.long_context")]
    less = [
        "~stages.long_context",
        "stages.online_dpo.optimizer.online_merging.base=pretrain",
        "stages.sft.starts_from=pretrain",
        *(f"stages.{name}.evaluate=false" for name in ("pretrain", "sft", "dpo")),
        "until=dpo",
    ]
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


# ---- generate and chat ----


def test_generate_continues_texts(talker, tmp_path):
    """What stands in the words stands in the prompt, whatever it is to Hydra."""
    prompts = ["the fox", "a, b=${c} 'd' [e] \\\\", "${HOME", "\\n\nnew line\\"]
    words = [f"prompt={prompt}" for prompt in prompts]
    done = program("generate", f"model={talker}", *words, "max_new_tokens=12", "format=jsonl", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ATTENTION)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        assert row["ended_by"] == "length" or row["tokens"] < 12
    done = program("generate", f"model={talker}", *words, "max_new_tokens=12", "batch_size=1", cwd=tmp_path)
    assert done.returncode == 0
    shown = [f"==> prompt {number} <==\n{row['reply']}\n" for number, row in enumerate(rows, 1)]
    assert done.stdout == "\n".join(shown)
    assert not list(tmp_path.iterdir())


def test_generate_is_seeded_and_stops(command, talker, tmp_path):
    def reply(*words):
        code, out, err = command("generate", f"model={talker}", "max_new_tokens=40", "prompt=fox", *words)
        assert (code, err) == (0, ATTENTION)
        return out

    sampled = [reply("temperature=1", f"seed={seed}") for seed in (1, 2, 1)]
    assert sampled[0] == sampled[2] != sampled[1]
    greedy = reply()
    assert greedy not in sampled
    assert reply("temperature=1", "top_k=1") == reply("temperature=1", "min_p=1") == greedy
    stop = greedy[5:8]
    assert reply(f"stop={stop}", "stop=never said") == greedy[: greedy.index(stop)] + "\n"


def test_generate_reads_files(command, talker, tmp_path):
    talk = [{"role": "user", "content": "hello"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk}) + '\n{"prompt": "hello"}\n')
    words = [f"model={talker}", "max_new_tokens=9", "format=jsonl"]
    code, out, _ = command("generate", *words, "prompts=rows.jsonl")
    assert code == 0
    talked, continued = map(json.loads, out.splitlines())
    assert (talked["messages"], continued["prompt"]) == (talk, "hello")
    for template, same in (("chat", talked), ("raw", continued)):
        code, out, _ = command("generate", *words, "prompt=hello", f"template={template}")
        assert json.loads(out)["reply"] == same["reply"]
    code, _, err = command("generate", *words, "prompts=rows.jsonl", "template=raw")
    assert (code, err.partition("\n")[2].startswith("error: rows.jsonl:1: ")) == (2, True)
    code, _, err = command("generate", *words, f"prompt={'fox ' * 300}")
    assert code == 2
    assert "the model's context is 256" in err


def test_generate_reads_beyond_the_context_by_dual_chunks(command, talker):
    words = [f"model={talker}", f"prompt={'fox ' * 300}", "max_new_tokens=9", "dual_chunk={chunk_size: 256}"]
    code, out, _ = command("generate", *words)
    assert code == 0
    assert out.strip()


def test_generate_reads_beyond_the_context_by_other_positions(command, talker):
    words = [f"model={talker}", f"prompt={'fox ' * 300}", "max_new_tokens=9"]
    said = []
    for scaling in (
        "{rope_type: linear, factor: 4}",
        "{rope_type: yarn, factor: 4, original_max_position_embeddings: 256}",
    ):
        code, out, _ = command("generate", *words, f"rope_scaling={scaling}")
        assert code == 0
        said.append(out)
    assert said[0] != said[1]
    for scaling, parts in {
        "{rope_type: linear, facter: 4}": ["rope_scaling.facter", "The nearest is factor"],
        "{rope_type: linear}": ["rope_scaling: factor has no value, and rope_type linear needs one"],
        "yarn": ["rope_scaling: 'yarn' is no mapping. Give {rope_type: linear, factor: ...}"],
    }.items():
        code, _, err = command("generate", *words, f"rope_scaling={scaling}")
        assert code == 2
        assert all(part in err for part in parts), err


def test_what_is_said_to_be_literal_is():
    words = ["model=[x]", 'stop=[","]', "stop=,", "stop=a=b", "prompt={x: 1}"]
    settings = build_settings(compose_tree("generate", cli._arranged("generate", words)))
    assert (settings.model.path, settings.stop, settings.prompt) == ("[x]", ['[","]', ",", "a=b"], ["{x: 1}"])


def test_generate_takes_the_artifacts_of_a_run(run_folder, command, tmp_path):
    root = (run_folder / "artifacts" / "sft").resolve().parent
    said = []
    for model in (run_folder / "artifacts" / "sft", run_folder / "artifacts" / "sft" / "model", "sft"):
        words = [f"model={model}", f"store.root={root}", "prompt=reverse 123", "template=chat", "max_new_tokens=8"]
        code, out, err = command("generate", *words)
        assert (code, err) == (0, ATTENTION)
        said.append(out)
    assert said[0] == said[1] == said[2]
    code, _, err = command("generate", f"model={run_folder}", "prompt=a")
    assert code == 2
    assert "artifacts/sft" in err


@pytest.fixture
def said(talker, capsys):
    """`said(*lines)` -> what a chat of nine tokens a reply says to each line of one conversation."""

    def say(*lines: str) -> list[str]:
        conversation = Conversation(load_speaker(talker, GenerationConfig(max_new_tokens=9), ComputeConfig()))
        replies = []
        for line in lines:
            conversation.say(line)
            replies.append(capsys.readouterr().out)
        return replies

    return say


def test_chat_over_pipes(talker, said, tmp_path):
    first, second = said("hello", "hello")
    assert first != second  # which is said to a conversation
    lines = ["hello", "", "hello", "/reset", "hello", "/rest", "fox " * 300, "hello", "/exit", "hello"]
    done = subprocess.run(
        [*PROGRAM, "chat", f"model={talker}", "max_new_tokens=9"], input="\n".join(lines), cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, first + second + first + second)
    attention, unknown, too_long = done.stderr.splitlines()
    assert f"{attention}\n" == ATTENTION
    assert unknown.startswith("/rest is no command")
    assert too_long.startswith("error: conversation: has ")


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, *words: str, cwd: Path):
        primary, secondary = pty.openpty()
        settings = termios.tcgetattr(secondary)
        settings[1] &= ~termios.OPOST  # newlines as they are written
        termios.tcsetattr(secondary, termios.TCSANOW, settings)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
        self.process = subprocess.Popen(
            [*PROGRAM, *words], cwd=cwd, env=environment, stdin=secondary, stdout=secondary, stderr=secondary,
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),  # so that Ctrl-C reaches it
        )  # fmt: skip
        os.close(secondary)
        self.primary, self.seen = primary, b""

    def type(self, text: str) -> None:
        os.write(self.primary, text.encode())

    def read_until(self, awaited: str, more_than: int = 0) -> str:
        """All that appears until `awaited` ends it, and more than so many bytes have come."""
        deadline = time.monotonic() + 60
        while not (self.seen.endswith(awaited.encode()) and len(self.seen) > more_than):
            assert select.select([self.primary], [], [], max(deadline - time.monotonic(), 0))[0], self.seen
            self.seen += os.read(self.primary, 4096)
        text, self.seen = self.seen.decode(), b""
        return text

    def await_input(self) -> None:
        """Until it sleeps over its prompt: Python does not see a signal that comes between the two."""
        state = Path(f"/proc/{self.process.pid}/stat")
        while state.read_text().rpartition(") ")[2][0] != "S":
            time.sleep(0.01)
        time.sleep(0.1)

    def end(self) -> int:
        return self.process.wait(60)


@pytest.fixture
def terminal(tmp_path):
    """`terminal(*words)` -> a Terminal in an empty folder; it does not outlive the test."""
    opened = []

    def open_(*words: str) -> Terminal:
        opened.append(Terminal(*words, cwd=tmp_path))
        return opened[-1]

    yield open_
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.primary)


def test_chat_on_a_terminal(talker, terminal, said):
    """Replies appear while they are said; Ctrl-C stops one and not the chat; Ctrl-D ends it."""
    [reply] = said("hello")
    talk = terminal("chat", f"model={talker}", "max_new_tokens=9")
    assert talk.read_until("> ") == f"{ATTENTION}{COMMANDS}\n> "
    talk.type("hello\n")
    assert talk.read_until("> ", more_than=len("hello\n> ")) == f"hello\n{reply}> "
    talk.type("half a line")
    talk.read_until("half a line")  # its echo
    talk.await_input()
    talk.type("\x03")
    talk.read_until(f"{COMMANDS}\n> ")
    talk.type("\x04")
    assert talk.end() == 0

    words = ["max_new_tokens=1_000_000", "dual_chunk={chunk_size: 256}", "temperature=1", "stop=\n"]
    talk = terminal("chat", f"model={talker}", *words)
    talk.read_until("> ")
    talk.type("hello\n")
    talk.read_until("hello\n")  # its echo
    assert select.select([talk.primary], [], [], 60)[0]  # the beginning of the reply
    talk.type("\x03")
    talk.read_until("\n> ")
    talk.type("/exit\n")
    assert talk.end() == 0


def test_generate_on_a_terminal(talker, terminal):
    talk = terminal("generate", f"model={talker}", "prompt=hello", "max_new_tokens=9", "stop=never said")
    shown = talk.read_until(" MiB\n")
    assert re.search(
        r"\n1 replies, 9 tokens in .* s \(.* per second\); keys and values of .* tokens take 0\.\d MiB\n$", shown
    )
    assert talk.end() == 0


def test_chat_is_ended_from_outside(talker, terminal):
    talk = terminal("chat", f"model={talker}")
    talk.read_until("> ")
    talk.await_input()
    talk.process.terminate()
    assert talk.end() == 128 + 15


def test_help_names_every_setting():
    for verb, schema in (("generate", GenerateSettings), ("chat", ChatSettings)):
        shown = cli.usage_of(verb, None)
        for setting in dataclasses.fields(schema):
            assert re.search(rf"\b{setting.name}\b", shown), setting.name


@pytest.mark.parametrize("key", ["model", "prompts"])
def test_paths_complete(key, command, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "mine.txt").touch()
    monkeypatch.setenv("COMP_LINE", f"lightning-llm generate {key}=m")
    assert command("-sc", "query=bash")[1].strip() == f"{key}=mine.txt {key}=models/"


@given(st.text(alphabet="\\'\"${}a =,[]\n:\u00e4", max_size=12))
def test_a_text_survives_hydras_grammar(text):
    override = OverridesParser.create().parse_override(f"x=[{cli._quoted(text)}]")
    assert OmegaConf.create({"x": override.value()})["x"][0] == text
