"""Another optimizer for one stage, from the command line to the trained artifact."""

import json
from pathlib import Path

import pytest

from lightning_llm import cli
from lightning_llm.pipeline.composition import CONF

OTHERS = sorted({path.stem for path in (CONF / "optimizer").glob("*.yaml")} - {"adamw"})


@pytest.mark.slow
def test_every_optimizer_trains_a_stage(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = ["run", "recipe=qwen2", *tiny, "until=pretrain", "stages.pretrain.lr.peak=3e-3"]
    run.append("stages.pretrain.evaluate=false")
    stages = {}
    for name in ("adamw", *OTHERS):
        assert cli.command([*run, f"optimizer@stages.pretrain.optimizer={name}"]) == 0
        folder = Path(capsys.readouterr().out.splitlines()[-1])
        stages[name] = json.loads((folder / "run.json").read_text())["stages"]
        record = json.loads((folder / "artifacts" / "pretrain" / "stage.json").read_text())
        assert record["settings"]["optimizer"]["name"] == name
    for name in OTHERS:
        assert stages[name]["pretrain"]["key"] != stages["adamw"]["pretrain"]["key"]
        assert stages[name]["pretrain.prepare"]["reused"]
        assert stages[name]["pretrain"]["metrics"]["validation/loss"] < 6.0  # log 512 = 6.2 where it begins
    losses = {name: stage["pretrain"]["metrics"]["validation/loss"] for name, stage in stages.items()}
    assert len(set(losses.values())) == len(losses)


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["optimizer.betas=[0.9,0.95,0.99]"], "optimizer.betas: must be two numbers in [0, 1)"),
        (["optimizer.mu_param.base_width=0"], "base_width: must be positive"),
        (["optimizer.mu_param.base_widht=64"], "The nearest is base_width"),
    ],
)
def test_a_mistake_is_one_line(words, mistake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.command(["plan", "recipe=qwen2", *(f"stages.pretrain.{word}" for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert mistake in error
    assert "stages.pretrain.optimizer" in error
