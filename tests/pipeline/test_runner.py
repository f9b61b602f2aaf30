"""Running a plan, with the real stages at a size of seconds: what is there is reused, what is cut or altered is not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_llm import compose, plan, run
from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.objectives.config import DPOConfig
from lightning_llm.optimization.config import LearningRateConfig
from lightning_llm.pipeline import Recipe, StageFailed
from lightning_llm.pipeline.config import LimitsConfig, StoreConfig
from lightning_llm.pipeline.runner import check_run
from lightning_llm.pipeline.store import Store
from lightning_llm.settings import UserError

ROOT = Path(__file__).parents[2]
STAGES = {"pretrain", "long_context", "sft", "dpo", "online_dpo"}  # whose models speak


class Place:
    """A copy of the finished run's store that a test may spoil, and runs in it."""

    def __init__(self, folder: Path, run_folder: Path, recipe: Recipe):
        self.folder = folder
        shutil.copytree((run_folder / "artifacts" / "sft").resolve().parent, folder / "artifacts")
        self.recipe = replace(recipe, store=StoreConfig(f"{folder}/artifacts"), runs=f"{folder}/runs")

    def run(self, recipe: Recipe | None = None, **selectors):
        return run(recipe or self.recipe, **selectors)

    def changed(self, stage: str, **changes) -> Recipe:
        """The recipe with one stage set otherwise."""
        stages = self.recipe.stages
        keys = frozenset(f"stages.{stage}.{name}" for name in changes)
        return replace(
            self.recipe,
            stages=stages | {stage: replace(stages[stage], **changes)},
            pinned=self.recipe.pinned | keys,
        )

    def artifact(self, name: str) -> Path:
        return next(path for path in Store(self.folder / "artifacts").artifacts() if path.name.startswith(name))


@pytest.fixture(scope="session")
def words(run_folder) -> list[str]:
    given = json.loads((run_folder / "run.json").read_text())["overrides"]
    return [word for word in given if not word.startswith(("recipe=", "scale=", "store.", "runs="))]


@pytest.fixture(scope="session")
def recipe(words) -> Recipe:
    return compose("qwen2", overrides=words)


@pytest.fixture
def place(tmp_path, run_folder, recipe) -> Place:
    return Place(tmp_path, run_folder, recipe)


def made(record) -> set[str]:
    return {name for name, stage in record.stages.items() if not stage["reused"]}


def test_a_run_leaves_what_others_rely_on(run_folder):
    facts = json.loads((run_folder / "run.json").read_text())
    assert (facts["recipe"], facts["scale"], facts["seed"], facts["status"]) == ("qwen2", "nano", 0, "done")
    for name in STAGES:
        stage = facts["stages"][name]
        assert {"artifact", "key", "reused", "metrics"} <= set(stage)
        assert (Path(stage["artifact"]) / "model" / "config.json").is_file()
        assert (run_folder / "artifacts" / name).resolve() == Path(stage["artifact"])
        assert {"perplexity/web", "tasks/exact_match", "preference/accuracy"} <= set(stage["metrics"])
    record = json.loads((run_folder / "artifacts" / "dpo" / "stage.json").read_text())
    assert record["inputs"]["starts_from"]["key"] == facts["stages"]["sft"]["key"]
    assert {"settings", "code_version", "libraries", "device", "threads", "ledger", "flops", "created"} <= set(record)
    assert set(record["seconds"]) == {"total", "load", "train", "validate", "save"}
    assert sum(record["seconds"].values()) <= 2 * record["seconds"]["total"]  # the phases lie within it
    plan = json.loads((run_folder / "plan.json").read_text())
    assert [stage["name"] for stage in plan["stages"]] == list(facts["stages"])
    assert (run_folder / "plan.txt").is_file()
    assert json.loads((run_folder / "recipe.json").read_text())["model"]["hidden_size"] == 32


def test_a_second_run_trains_nothing_and_an_override_only_what_depends_on_it(place):
    again = place.run()
    assert made(again) == set()
    assert STAGES <= set(again.stages)
    other = place.run(place.changed("dpo", objective=DPOConfig(beta=0.3)))
    assert made(other) == {"dpo", "dpo.evaluate", "online_dpo", "online_dpo.evaluate"}
    assert other.stages["dpo"]["key"] != again.stages["dpo"]["key"]


def test_selectors(place):
    until = place.run(until="sft")
    assert not [name for name in until.stages if name.startswith("dpo")]
    assert {"tokenizer", "evaluation.prepare", "pretrain.evaluate", "sft.evaluate"} <= set(until.stages)
    only = place.run(only="dpo", force=["dpo"])
    assert made(only) == {"dpo.prepare", "dpo.reference", "dpo", "dpo.evaluate"}
    for selector, near in ({"until": "stf"}, "sft"), ({"only": "stf"}, "sft"), ({"force": ["pretrian"]}, "pretrain"):
        with pytest.raises(UserError, match=near):
            place.run(**selector)
    with pytest.raises(UserError, match=r"only=dpo: sft is not in the store.*until=sft"):
        place.run(place.changed("sft", rope_theta=77.0), only="dpo")
    weights = place.artifact("train-sft") / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[::-1])
    with pytest.raises(UserError, match=r"only=dpo: sft is damaged in the store.*until=sft"):
        place.run(only="dpo", force=["dpo"])
    weights.write_bytes(content)


def test_an_altered_artifact_is_made_again(place):
    weights = place.artifact("train-dpo") / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert made(place.run()) == {"dpo"}
    assert made(place.run()) == set()


def test_a_failed_stage_keeps_what_was_made(place):
    with pytest.raises(StageFailed) as caught:
        place.run(place.changed("dpo", lr=LearningRateConfig(schedule="constant", peak=1e30)))
    assert caught.value.stage == "dpo"
    assert "sft" in caught.value.kept
    assert isinstance(caught.value.__cause__, Exception)
    folder = max((place.folder / "runs" / "qwen2").iterdir())
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    assert made(place.run()) == set()


def test_the_users_own_data_and_its_mistakes(place):
    rows = [{"prompt": f"say {i}", "completion": f"{i} and {i}"} for i in range(40)]
    path = place.folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "say"}])))
    mine = DataConfig(
        name="mine",
        form="conversations",
        sources={"mine": SourceConfig(path=str(path))},
        max_epochs=1000,
        validation=0.05,
        tokens_per_example=20,
    )
    with pytest.raises(UserError, match=r"mine\.jsonl:41.*completion"):
        place.run(place.changed("sft", data=mine), only="sft")
    trained = [path for path in (place.folder / "artifacts").glob("train-*")]
    with pytest.raises(UserError, match=r"mine\.jsonl:41.*completion"):
        place.run(replace(place.changed("sft", data=mine), seed=17))  # all is to be made anew, and none of it was
    assert [path for path in (place.folder / "artifacts").glob("train-*")] == trained
    record = place.run(place.changed("sft", data=replace(mine, on_error="skip")), only="sft")
    assert made(record) == {"sft.prepare", "sft", "sft.evaluate"}


def test_tokens_of_another_run_are_taken(place, words):
    """With the tokens of its own sources a stage learns from the same rows as before, and nothing is tokenised."""
    tokens = place.artifact("prepare-sft.prepare")
    assert (tokens / "sources" / "instructions" / "train" / "store.json").is_file()
    data = place.recipe.stages["sft"].data
    stored = {name: replace(source, path=str(tokens / "sources" / name)) for name, source in data.sources.items()
              if (tokens / "sources" / name).is_dir()}  # fmt: skip
    record = place.run(place.changed("sft", data=replace(data, sources=stored, validation=0.05)), only="sft")
    assert "sft.prepare" in made(record)
    for file in (tokens / "sources").rglob("*.bin"):
        again = record.artifact("sft.prepare") / file.relative_to(tokens)
        assert again.read_bytes() == file.read_bytes()
        assert again.stat().st_ino == file.stat().st_ino  # and nothing is copied
    before = place.run(only="sft").stages["sft"]["metrics"]
    for metric in ("loss", "validation/loss", "perplexity/web"):
        assert record.stages["sft"]["metrics"][metric] == before[metric]
    web = place.artifact("prepare-pretrain.prepare") / "sources" / "web"
    words = [*words, f"stages.pretrain.data.sources.web.path={web}", f"store.root={place.folder}/artifacts"]
    checked = check_run(compose("qwen2", overrides=words))
    assert checked.keys["tokenizer"] == record.stages["tokenizer"]["key"]  # of tokens no merges are learnt
    assert checked.there["pretrain.prepare"] is None
    for setting in ("stages.pretrain.data.sources.web.max_rows=5", "+stages.pretrain.data.sources.web.columns.text=x"):
        with pytest.raises(UserError, match=r"sources\.web\.(max_rows|columns): is given, and .* holds tokens"):
            compose("qwen2", overrides=[*words, setting])


def test_a_model_of_elsewhere(place):
    """An artifact, or a Hugging Face directory: its tokenizer comes with it, unless another is asked for."""
    path = place.artifact("train-sft")
    shutil.copytree(path / "model", place.folder / "model")
    for outside in (path, place.folder / "model"):
        record = place.run(place.changed("dpo", starts_from=str(outside)), only="dpo")
        assert {"dpo.tokenizer", "dpo.evaluation", "dpo.reference", "dpo"} <= set(record.stages)
        assert "tokenizer" not in record.stages
    assert made(record) == set()  # the same files are the same model
    with pytest.raises(UserError, match="holds no model"):
        place.run(place.changed("dpo", starts_from=str(place.folder / "runs")))
    shutil.copytree(place.artifact("prepare-tokenizer") / "tokenizer", place.folder / "tokenizer")
    template = place.folder / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    other = replace(place.recipe.model, tokenizer=str(place.folder / "tokenizer"))
    mixed = place.changed("dpo", starts_from=str(path))
    mixed = replace(mixed, model=other, pinned=mixed.pinned | {"model.tokenizer"})
    with pytest.raises(UserError, match=r"dpo.starts_from: .* has another chat template .* than the data of dpo"):
        place.run(mixed, only="dpo")


def test_a_damaged_model_of_elsewhere_is_refused_before_anything_runs(place):
    elsewhere = shutil.copytree(place.artifact("train-sft") / "model", place.folder / "model")
    recipe = place.changed("dpo", starts_from=str(elsewhere))
    weights, config = elsewhere / "model.safetensors", elsewhere / "config.json"
    whole, facts = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: is not a readable safetensors file"):
        place.run(recipe)
    weights.write_bytes(whole)
    config.write_text(json.dumps(facts | {"intermediate_size": 65}))
    with pytest.raises(UserError, match=r"mlp\.\w+_proj\.weight: has shape .*, config\.json asks for .*65"):
        place.run(recipe)
    assert not (place.folder / "runs").exists()
    config.write_text(json.dumps(facts))
    assert "dpo" in check_run(recipe, only="dpo").keys


def test_data_that_is_not_there_is_refused_before_anything_runs(place):
    data = place.recipe.stages["dpo"].data
    absent = replace(data, sources={"mine": SourceConfig(path=f"{place.folder}/absent.jsonl")}, validation=0.05)
    with pytest.raises(UserError, match=r"stages\.dpo\.data\.sources\.mine\.path: there is no file .*absent\.jsonl"):
        place.run(place.changed("dpo", data=absent))
    assert not (place.folder / "runs").exists()


def test_too_long_for_this_machine(place):
    short = replace(place.changed("dpo", examples=1e7), limits=LimitsConfig(hours=0.001))
    with pytest.raises(UserError, match=r"limits\.hours: about .* are more than 0\.001 hours"):
        place.run(short)
    assert not (place.folder / "runs").exists()


def test_no_gpu(place):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    gpu = replace(place.recipe.compute, name="gpu", accelerator="gpu", precision="bf16")
    with pytest.raises(UserError, match="compute=gpu: wants 1 GPUs, torch sees 0"):
        place.run(replace(place.recipe, compute=gpu))


def test_it_says_once_and_first_which_attention_it_computes_with(place, capsys):
    place.run(place.recipe, only="dpo", force=["dpo"])
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "attention by sdpa (the fastest on a CPU, and trains)"
    assert sum("attention" in line for line in said) == 1


def test_attention_that_a_cpu_does_not_have_is_planned_with_a_note_and_refused_before_anything_is_made(place):
    recipe = replace(place.recipe, compute=replace(place.recipe.compute, attention="flash"))
    assert "compute.attention: flash needs an NVIDIA GPU; a run would refuse it" in plan(recipe).notes
    with pytest.raises(UserError, match=r"compute\.attention: flash needs an NVIDIA GPU\. Set compute"):
        place.run(replace(recipe, seed=77))
    assert not (place.folder / "runs").exists()


def test_ctrl_c_while_preparing(place, words):
    """One line and its exit code; nothing half-written is left."""
    rows = (json.dumps({"text": f"row {i} counts on to {i + 1} and so forth. " * 20}) + "\n" for i in range(200_000))
    path = place.folder / "long.jsonl"
    with path.open("w") as file:
        file.writelines(rows)
    own = ["data@stages.pretrain.data=own_text", f"stages.pretrain.data.sources.mine.path={path}", "until=pretrain"]
    places = [f"store.root={place.folder}/artifacts", f"runs={place.folder}/runs"]
    program = [sys.executable, "-m", "lightning_llm.cli", "run", "recipe=qwen2", *words, *own, *places]
    started = subprocess.Popen(
        program, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=place.folder
    )
    making = place.folder / "artifacts" / ".making"
    while not list(making.glob("prepare-pretrain.prepare-*/sources/mine/*")) and started.poll() is None:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 130, said
    last = said.splitlines()[-1]
    assert last == "interrupted; the same command continues with the stage that was cut"
    assert "Traceback" not in said
    [run_folder] = (place.folder / "runs" / "qwen2").iterdir()
    facts = json.loads((run_folder / "run.json").read_text())
    assert (facts["status"], "tokenizer" in facts["stages"]) == ("interrupted", True)
    assert not list(making.iterdir())


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_continues(place, words, number):
    places = [f"store.root={place.folder}/artifacts", f"runs={place.folder}/runs", "limits.hours=1e9"]
    endless = [word for word in words if not word.startswith("stages.dpo.examples")] + ["stages.dpo.examples=1e9"]
    program = [sys.executable, "-m", "lightning_llm.cli", "run", "recipe=qwen2", *endless, *places]
    started = subprocess.Popen(
        [*program, "stages.dpo.data.max_epochs=1e9"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    making = place.folder / "artifacts" / ".making"
    while not list(making.glob("train-dpo-*/metrics.jsonl")) and started.poll() is None:
        time.sleep(0.05)
    started.send_signal(number)
    said = started.communicate(timeout=30)[1]
    if number == signal.SIGKILL:  # nothing can be said or tidied up: what was made before is all there
        assert started.returncode == -number
        assert made(place.run()) == set()
        return
    assert started.returncode == 130, said
    assert "Traceback" not in said
    assert "continues" in said
    run_folder = max((place.folder / "runs" / "qwen2").iterdir())
    assert json.loads((run_folder / "run.json").read_text())["status"] == "interrupted"
    assert not list(making.iterdir())
    assert made(place.run()) == set()
