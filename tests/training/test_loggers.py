"""Loggers: what the journal writes is read back from TensorBoard's events, W&B's file and MLflow's store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_llm import cli, compose, plan
from lightning_llm.pipeline.key import node_keys
from lightning_llm.settings import UserError
from lightning_llm.training import loggers
from lightning_llm.training.config import MLflowConfig, TensorBoardConfig, WandbConfig
from lightning_llm.training.loggers import flat, refuse_absent

ROOT = Path(__file__).parents[2]
CONFIGS = {"tensorboard": TensorBoardConfig(), "wandb": WandbConfig(), "mlflow": MLflowConfig()}


def installed(name):
    try:
        refuse_absent([CONFIGS[name]])
    except UserError:
        return False
    return True


def lines_of(folder):
    """metrics.jsonl of pretrain; its lines of training and of validation may share a step."""
    return [json.loads(line) for line in (folder / "artifacts/pretrain/metrics.jsonl").read_text().splitlines()]


def values_of(lines, name):
    return [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if line.get(name) is not None]


@pytest.fixture(scope="module")
def logged(tiny, tmp_path_factory):
    """The folder of a run with every logger that is installed, in a process of its own: their warnings are theirs."""
    chosen = [name for name in CONFIGS if installed(name)]
    if not chosen:
        pytest.skip("none of tensorboard, wandb and mlflow is installed: pip install 'lightning-llm[loggers]'")
    place = tmp_path_factory.mktemp("logged")
    words = ["run", "recipe=qwen2", *tiny, "until=pretrain", "evaluation.questions=4", f"logger=[{','.join(chosen)}]"]
    script = "import sys; from lightning_llm.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "WARN" not in done.stderr.upper(), done.stderr
    return place / done.stdout.splitlines()[-1], done.stderr


@pytest.mark.slow
def test_tensorboard_has_the_journals_lines(logged):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, _ = logged
    place = folder.parents[2] / "logs" / "tensorboard" / "qwen2" / folder.name / "pretrain"
    events = accumulator.EventAccumulator(str(place))
    events.Reload()
    lines = lines_of(folder)
    assert len(lines) > 10
    for name in ("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "validation/loss"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == values_of(lines, name), name
    consumed = [event.value for event in events.Scalars("consumed/web")]
    assert consumed == [line["consumed"]["web"] for line in lines if "consumed" in line]
    assert "step" not in events.Tags()["scalars"]
    parameters = (place / "hparams.yaml").read_text()
    assert "optimizer/name: adamw" in parameters
    assert "model/hidden_size: 32" in parameters


@pytest.mark.slow
def test_mlflow_has_the_journals_lines(logged):
    if not installed("mlflow"):
        pytest.skip("mlflow, sqlalchemy or alembic is not installed: pip install 'lightning-llm[loggers]'")
    folder, _ = logged
    script = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient("sqlite:///logs/mlflow.db")
[run] = client.search_runs([client.get_experiment_by_name("qwen2").experiment_id])
history_of = lambda name: client.get_metric_history(run.info.run_id, name)
history = {name: [(m.step, m.value) for m in history_of(name)] for name in run.data.metrics}
print(json.dumps([run.info.run_name, run.info.status, run.data.params, run.data.tags, history]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder.parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    name, status, parameters, tags, history = json.loads(done.stdout)
    assert (name, status) == (f"{folder.name}/pretrain", "FINISHED")
    assert (tags["recipe"], tags["run"], tags["stage"]) == ("qwen2", folder.name, "pretrain")
    assert parameters["optimizer/betas"] == "[0.9, 0.95]"
    lines = lines_of(folder)
    for name in ("loss", "tokens", "validation/loss"):
        by_step = {}
        for step, value in map(tuple, history[name]):
            by_step.setdefault(step, []).append(value)
        for step, value in values_of(lines, name):
            assert value in by_step[step], name


@pytest.mark.slow
def test_a_failed_stage_is_called_one(tmp_path):
    if not installed("mlflow"):
        pytest.skip("mlflow, sqlalchemy or alembic is not installed: pip install 'lightning-llm[loggers]'")
    script = """
from mlflow import MlflowClient
from lightning_llm.optimization.config import LionConfig
from lightning_llm.training.config import LoggedRun, MLflowConfig
from lightning_llm.training.loggers import log_line, stage_loggers

try:
    with stage_loggers(LoggedRun("mine", "run", [MLflowConfig(experiment="other")]), "sft", LionConfig()) as loggers:
        log_line(loggers, {"step": 3, "loss": float("nan"), "tokens": 7})
        raise KeyboardInterrupt
except KeyboardInterrupt:
    client = MlflowClient("sqlite:///logs/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("other").experiment_id])
    print(run.info.run_name, run.info.status, run.data.metrics, run.data.params["name"])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "run/sft FAILED {'tokens': 7.0} lion\n"


@pytest.mark.slow
def test_wandb_has_a_run_of_each_stage(logged):
    if not installed("wandb"):
        pytest.skip("wandb is not installed: pip install 'lightning-llm[loggers]'")
    folder, said = logged
    [place] = (folder.parents[2] / "logs" / "wandb").glob("offline-run-*")
    [file] = place.glob("*.wandb")
    content = file.read_bytes()  # protobuf records; names, and values as JSON, are readable in it
    for text in (b"pretrain", folder.name.encode(), b"tokens_per_second", b"validation/loss", b"optimizer/betas"):
        assert text in content, text
    last = [line for line in lines_of(folder) if "loss" in line][-1]
    assert json.dumps(last["loss"]).encode() in content
    assert "wandb" not in said


# ---- without any package ----


def test_figures_of_any_shape_become_flat():
    assert flat({"a": {"b": {"c:d": 1}, "e": None}, "f": (1, 2), "g": "x"}) == {"a/b/c_d": 1, "f": "[1, 2]", "g": "x"}
    assert flat({"lr": {"peak": 0.1, "final": None}, "betas": [0.9]}) == {"lr/peak": 0.1, "betas": "[0.9]"}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_absent_package_is_one_line_before_anything_runs(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    assert cli.command(["run", "recipe=qwen2", f"logger={name}"]) == 2
    packages = " and ".join(CONFIGS[name].packages)
    assert capsys.readouterr().err == (
        f"error: logger={name}: needs {packages}, not installed here. pip install 'lightning-llm[loggers]'.\n"
    )
    assert not list(tmp_path.rglob("run.json"))
    assert cli.command(["plan", "recipe=qwen2", f"logger={name}"]) == 0


def test_loggers_enter_no_key():
    keys = [
        node_keys(plan(compose("qwen2", overrides=words)).nodes, lambda source, where: "content")
        for words in ([], ["logger=[tensorboard,mlflow]", "logger.mlflow.experiment=other"])
    ]
    assert keys[0] == keys[1]


def test_several_loggers_and_none():
    assert compose("qwen2").logger == {}
    recipe = compose("qwen2", overrides=["logger=[wandb,tensorboard]", "logger.wandb.offline=false"])
    assert recipe.logger == {"wandb": WandbConfig(offline=False), "tensorboard": TensorBoardConfig()}


def test_a_logger_that_is_none_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, mistake in (
        (["logger=foo"], "foo is not an option of logger"),
        (["logger.tensorboard.directory=x"], "logger"),
        (["+logger.mine.name=mine"], "logger.mine"),
        (["logger=tensorboard", "logger.tensorboard.directori=x"], "The nearest is directory"),
    ):
        assert cli.command(["plan", "recipe=qwen2", *words]) == 2
        error = capsys.readouterr().err
        assert mistake in error
        assert error.count("\n") == 1
