"""A teacher in a recipe: its edge, its node, its costs, its shape, its mistakes, and real runs."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_llm import compose, plan, run
from lightning_llm.models.size import forward_flops_per_token, parameter_counts
from lightning_llm.pipeline.key import node_keys
from lightning_llm.pipeline.scaling import scaled
from lightning_llm.settings import UserError

STUDENT = [
    "+stage@stages.student=distil",
    "stages.student.learns_from=long_context",
    "stages.student.tokens=1e12",
    "stages.student.batch_tokens=4e6",
    "stages.student.lr.peak=3e-4",
    "scale.minimum_share=0.2",
]
LIVE = [
    "+stage@stages.on_policy=on_policy_distil",
    "stages.on_policy.starts_from=sft",
    "stages.on_policy.learns_from=dpo",
    "stages.on_policy.examples=1000",
    "stages.on_policy.context=4096",
    "stages.on_policy.lr.peak=1e-6",
]
GIB = 2**30
ROOT = Path(__file__).parents[2]


@functools.cache
def nodes_of(*words, recipe="qwen2"):
    return {node.name: node for node in plan(compose(recipe, overrides=words)).nodes}


def keys_of(*words):
    nodes = nodes_of(*words, "scale.corpora.docs.path=null")
    return node_keys(list(nodes.values()), lambda source, where: "text")


def test_what_a_teacher_says_is_a_node_before_its_student():
    nodes = nodes_of(*STUDENT)
    asked = nodes["student.teacher"]
    assert asked.kind == "score"
    assert asked.inputs == {"model": "long_context", "data": "student.prepare", "tokenizer": "tokenizer"}
    assert (asked.settings.k, asked.settings.stored_as, asked.settings.split) == (1, None, ["train"])
    assert nodes["student"].inputs["teacher"] == "student.teacher"
    assert "teacher_model" not in nodes["student"].inputs
    names = list(nodes)
    assert names.index("long_context") < names.index("student.teacher") < names.index("student")
    assert asked.figures["disk_gib"] == 2 * asked.figures["tokens"] / GIB


@pytest.mark.parametrize(("stored_as", "of_token"), [("float16", 8 * 2 + 10 * 2), ("uint8", 8 * 2 + 10)])
def test_the_plan_knows_what_is_kept(stored_as, of_token):
    choice = {"targets": "top_k", "k": 8, "stored_as": stored_as}
    nodes = nodes_of(*STUDENT, *(f"stages.student.objective.{name}={value}" for name, value in choice.items()))
    figures, student = nodes["student.teacher"].figures, nodes["student"].figures
    assert figures["tokens"] == student["tokens"]
    assert figures["disk_gib"] == pytest.approx(of_token * figures["tokens"] / GIB)
    assert figures["flops"] == pytest.approx(student["flops"] / 3)  # one forward pass of a model of its shape


def test_a_live_teacher_costs_flops_and_memory_in_every_step():
    words = [*STUDENT, "+model@stages.pretrain.model=qwen2_72b"]
    kept, live = nodes_of(*words), nodes_of(*words, "stages.student.objective.targets=full")
    assert "student.teacher" not in live
    assert live["student"].inputs["teacher_model"] == "long_context"
    shape = live["long_context"].settings.model
    more = live["student"].figures["flops"] - kept["student"].figures["flops"]
    figures = live["student"].figures
    assert more == pytest.approx(figures["tokens"] * forward_flops_per_token(shape, figures["context"]), rel=1e-6)
    heavier = figures["memory_gib"] - kept["student"].figures["memory_gib"]
    assert heavier == pytest.approx(4 * parameter_counts(shape)["total"] / GIB)


def test_a_stage_may_bring_its_own_model_and_the_scale_knows_a_teachers_shape():
    recipe = scaled(compose("qwen2", overrides=[*STUDENT, "+model@stages.pretrain.model=gemma2_9b"]))
    teacher = recipe.stages["pretrain"].model
    shape = recipe.scale.shapes["teacher"]
    assert (teacher.hidden_size, teacher.num_hidden_layers) == (shape["hidden_size"], shape["num_hidden_layers"])
    assert (teacher.family, teacher.final_logit_softcapping) == ("gemma2", 30.0)
    assert (teacher.vocab_size, teacher.tokenizer) == (recipe.model.vocab_size, recipe.model.tokenizer)
    nodes = {node.name: node for node in plan(recipe).nodes}
    assert nodes["long_context"].settings.model == nodes["pretrain"].settings.model
    assert nodes["student"].settings.model.hidden_size == recipe.model.hidden_size
    narrow = ["+model@stages.student.model=qwen2_0_5b", "stages.student.model.hidden_size=64"]
    own = scaled(compose("qwen2", overrides=[*STUDENT, *narrow])).stages["student"].model
    assert own.hidden_size == 64
    assert own.num_hidden_layers == recipe.model.num_hidden_layers  # of the scale's policy
    paper = scaled(compose("qwen2", scale="paper", overrides=[*STUDENT, "+model@stages.pretrain.model=qwen2_72b"]))
    assert paper.stages["pretrain"].model.hidden_size == 8192


def test_the_weight_of_a_teacher_leaves_what_it_says_alone():
    """A sweep over the mixture asks the teacher once."""
    weights = [keys_of(*STUDENT, f"stages.student.objective.teacher_weight={weight}") for weight in (0.3, 0.9)]
    assert weights[0]["student.teacher"] == weights[1]["student.teacher"]
    assert weights[0]["student"] != weights[1]["student"]
    others = [["targets=top_k"], ["targets=top_k", "k=8"], ["targets=top_k", "stored_as=uint8"]]
    keys = [keys_of(*STUDENT, *(f"stages.student.objective.{word}" for word in words)) for words in others]
    taught = [weights[0]["student.teacher"], *(key["student.teacher"] for key in keys)]
    taught.append(keys_of(*STUDENT, "stages.student.learns_from=pretrain")["student.teacher"])
    taught.append(keys_of(*STUDENT, "scale.corpora.web.max_rows=30")["student.teacher"])
    assert len(set(taught)) == len(taught)


def test_no_reverse_divergence_from_a_teacher_with_fewer_ids(talker):
    words = [*STUDENT, f"stages.student.learns_from={talker}", "model.vocab_size=2048"]
    full = "stages.student.objective.targets=full"
    refused = r"stages\.student\.objective\.direction: is reverse, .* it has \d+, the student 2,048\. Choose forward"
    with pytest.raises(UserError, match=refused):
        nodes_of(*words, full, "stages.student.objective.direction=reverse")
    nodes = nodes_of(*words, full, "stages.student.objective.direction=jensen_shannon")
    assert nodes["student"].settings.model.vocab_size == 2048


def test_a_teacher_of_elsewhere_brings_its_tokenizer_and_vocabulary(talker):
    nodes = nodes_of(*STUDENT, f"stages.student.learns_from={talker}")
    assert nodes["student.tokenizer"].settings.source == str(talker)
    assert nodes["student.teacher"].inputs["tokenizer"] == "student.tokenizer"
    assert nodes["student"].settings.model.vocab_size == json.loads((talker / "config.json").read_text())["vocab_size"]
    assert nodes["student.evaluate"].inputs["data"] == "student.evaluation"
    assert nodes["pretrain"].inputs["tokenizer"] == "tokenizer"


def test_the_plan_says_that_a_teacher_is_asked_on_one_device():
    said = "student.teacher: on one of the 8 devices"
    assert said in str(plan(compose("qwen2", "paper", [*STUDENT, "compute=ddp"])))
    assert said not in str(plan(compose("qwen2", overrides=STUDENT)))


def test_sequences_and_own_responses_of_a_student():
    nodes = nodes_of(recipe="distillation")
    assert nodes["answers"].inputs["model.0"] == "larger_sft"
    assert nodes["answers"].settings.per_prompt == 1  # the recipe's: a scale draws no more than that
    assert nodes["written"].inputs == {"samples.0.0": "answers"}
    assert nodes["sft.prepare"].inputs["source.written"] == "written"
    on_policy = nodes["on_policy"]
    assert (on_policy.inputs["starts_from"], on_policy.inputs["teacher_model"]) == ("sft", "larger_sft")
    assert not [role for role in on_policy.inputs if role.startswith("reward_model")]
    assert on_policy.settings.judge is None
    assert on_policy.settings.objective.direction == "reverse"
    larger, student = (nodes[name].figures["parameters"] for name in ("larger", "student"))
    assert larger > 2 * student


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stages.student.learns_from=null"], "stages.student.learns_from: has no value, and distillation needs"),
        (["stages.student.learns_from=longcontext"], "learns_from: longcontext is neither .* nearest is long_context"),
        (["stages.student.learns_from=student"], "goes round in a circle"),
        (
            ["stages.student.objective.targets=top_k", "stages.student.objective.k=5000"],
            r"objective\.k: is 5,000, .* most 1022",
        ),
        (
            ["+model@stages.pretrain.model=gemma2_9b", "stages.pretrain.model.vocab_size=100"],
            r"stages\.pretrain\.model\.vocab_size: 100 rows cannot hold a tokenizer of 1,024",
        ),
        (["stages.sft.learns_from=pretrain"], "stages.sft.learns_from: is given, and causal_lm knows no teacher"),
        (["stages.student.starts_from=long_context"], "stages.student.learns_from: is long_context, which the stage"),
        (["stages.student.objective.targets=top_p"], "targets: is top1, top_k or full"),
        (["+model@stages.sft.model=qwen2_7b"], "stages.sft.model: is given, and the stage starts from"),
        (["stages.student.objective.kk=3"], "kk is not a setting of distillation"),
        (
            ["+stage@stages.reward=reward_model", "stages.reward.starts_from=sft", "stages.reward.tokens=1e6",
             "stages.reward.batch_tokens=1e5", "stages.reward.lr.peak=1e-5", "stages.student.learns_from=reward"],
            "stages.student.learns_from: reward is a reward model",
        ),
        ([*LIVE, "stages.on_policy.objective.targets=top_k"], "objective.targets: .* Set it to full"),
        ([*LIVE, "stages.on_policy.objective.teacher_weight=0.5"], "on_policy.objective.teacher_weight: is 0.5"),
        ([*LIVE, "stages.on_policy.learns_from=null"], "stages.on_policy.learns_from: has no value"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words, says):
    words = [word for word in words]
    if "stages.on_policy.objective.targets=top_k" in words:
        words.append("stages.on_policy.objective.direction=forward")
    with pytest.raises(UserError, match=says) as caught:
        plan(compose("qwen2", overrides=[*STUDENT, *words]))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_with_a_teacher_that_is_there_and_a_sweep_that_asks_it_once(beside, run_folder, tmp_path):
    words = [*beside(tmp_path), *STUDENT, "stages.student.evaluate=false", "stages.student.tokens=8000"]
    words += ["+model@stages.student.model=qwen2_0_5b", "stages.student.model.hidden_size=16"]
    words += ["stages.student.model.num_attention_heads=2", "stages.student.model.num_key_value_heads=1"]
    words += ["stages.student.model.num_hidden_layers=1", "stages.student.model.intermediate_size=32"]
    first = run(compose("qwen2", overrides=words), until="student")
    assert not any(first.stages[name]["reused"] for name in ("student.teacher", "student"))
    record = json.loads((first.artifact("student.teacher") / "stage.json").read_text())
    assert record["metrics"]["bytes_per_token"] == 2
    assert record["metrics"]["tokens_per_second"] > 0
    again = run(compose("qwen2", overrides=[*words, "stages.student.objective.teacher_weight=0.3"]), until="student")
    assert {name for name, stage in again.stages.items() if not stage["reused"]} == {"student"}
    losses = [result.stages["student"]["metrics"]["validation/loss"] for result in (first, again)]
    assert losses[0] != losses[1]


class Asking:
    """The command line with a teacher that is asked about much text in small batches, in a copy of a finished store."""

    def __init__(self, folder, own):
        self.making = folder / "artifacts" / ".making"
        self.store = folder / "artifacts"
        words = [*own, *STUDENT, "stages.student.tokens=40_000", "stages.student.data.max_epochs=1e3", "until=student"]
        words += ["stages.student.objective={targets: top_k, k: 8}", "compute.micro_batch_tokens=32"]
        words += ["stages.student.data.sources.web.max_rows=400"]
        program = [sys.executable, "-m", "lightning_llm.cli", "run", "recipe=qwen2", *words]
        self.program, self.environment = program, os.environ | {"PYTHONPATH": str(ROOT)}

    def stopped(self, pattern, number):
        """What was said up to a signal that comes as soon as there is a file of this pattern in the store."""
        process = subprocess.Popen(
            self.program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment
        )
        until = time.monotonic() + 120
        while process.poll() is None and not list(self.store.glob(pattern)) and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        return said


DONE = "score-student.teacher-*"


@pytest.fixture(scope="module")
def uninterrupted(beside, tmp_path_factory):
    """The folder of a teacher that was asked in one go."""
    folder = tmp_path_factory.mktemp("whole")
    assert "were scored before" not in Asking(folder, beside(folder)).stopped(DONE, signal.SIGKILL)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_teacher_that_was_killed_goes_on_where_it_was(number, uninterrupted, beside, tmp_path):
    """And leaves the bytes of one that nobody has interrupted."""
    done, artifacts = DONE, []
    killed = Asking(tmp_path, beside(tmp_path))
    killed.stopped(f".making/{done}/scored.json", number)
    [left] = killed.making.glob(f"{done}/scored.json")
    place = json.loads(left.read_text())["tokens"]
    said = killed.stopped(done, signal.SIGKILL)
    assert place > 0
    assert f"{place:,} of " in said
    assert "tokens were scored before" in said
    for folder in (uninterrupted, tmp_path):
        [artifact] = (folder / "artifacts").glob(done)
        artifacts.append(artifact)
    files = [sorted(p.relative_to(artifact) for p in artifact.rglob("*") if p.is_file()) for artifact in artifacts]
    assert files[0] == files[1]
    for name in files[0]:
        if name.name != "stage.json":
            assert (artifacts[0] / name).read_bytes() == (artifacts[1] / name).read_bytes(), name
    one, other = (json.loads((artifact / "stage.json").read_text()) for artifact in artifacts)
    assert place < one["metrics"]["tokens"]
    for name in ("tokens", "targets", "teacher/favours_label", "teacher/kept_mass"):
        assert one["metrics"][name] == other["metrics"][name]
    assert one["flops"] == other["flops"]


@pytest.mark.slow
def test_a_run_on_the_students_own_responses(beside, tmp_path):
    corpus = ["scale.corpora.prompts.options.questions=20", "scale.corpora.prompts.options.held_out=5"]
    words = [*beside(tmp_path), *LIVE, *corpus, "stages.on_policy.rollout.prompts=8", "stages.on_policy.examples=32"]
    words += ["stages.on_policy.rollout.held_out=6", "stages.on_policy.rollout.max_new_tokens=12"]
    record = run(compose("qwen2", overrides=words), until="on_policy")
    metrics = record.stages["on_policy"]["metrics"]
    assert metrics["steps"] == 4
    assert metrics["validation/loss"] == pytest.approx(metrics["validation/kl/teacher"])
    assert metrics["kl/teacher"] > 0
    assert not [name for name in metrics if name.startswith("reward/")]
    lines = (record.artifact("on_policy") / "metrics.jsonl").read_text().splitlines()
    assert "validation/kl/teacher" in json.loads(lines[0])
