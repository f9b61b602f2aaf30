"""What is refused once the data is prepared, and before anything trains."""

from __future__ import annotations

import shutil

import pytest

from lightning_llm import compose, run
from lightning_llm.settings import UserError

STUDENT = [
    "stages.pretrain.lr.peak=7e-3",  # so that nothing of what is trained is there
    "+stage@stages.student=distil",
    "stages.student.starts_from=long_context",
    "stages.student.learns_from=pretrain",
    "stages.student.tokens=2000",
    "stages.student.batch_tokens=1000",
    "stages.student.lr.peak=1e-3",
]
AFTER_IT = [
    "+stage@stages.last=sft",
    "stages.last.starts_from=student",
    "stages.last.examples=20",
    "stages.last.batch_tokens=1000",
]
OTHER_LINE = [
    "+stage@stages.other=pretrain",
    "stages.other.tokens=2000",
    "stages.other.batch_tokens=1000",
    "stages.other.lr.peak=1e-3",
    "stages.student.learns_from=other",
]


@pytest.fixture
def refused(beside, tmp_path):
    """`refused(words, says)`: with one line, and nothing was trained or asked for it."""

    def try_it(words, says):
        given = beside(tmp_path)
        there = set((tmp_path / "artifacts").glob("[!p]*-*"))
        with pytest.raises(UserError, match=says) as caught:
            run(compose("qwen2", overrides=[*given, *words]))
        assert "\n" not in str(caught.value)
        assert set((tmp_path / "artifacts").glob("[!p]*-*")) == there

    return try_it


@pytest.mark.parametrize("targets", ["top1", "full"])
def test_a_teacher_of_elsewhere_with_another_tokenizer(targets, refused, talker):
    words = [*STUDENT, f"stages.student.learns_from={talker}", f"stages.student.objective.targets={targets}"]
    refused(words, rf"^stages\.student\.learns_from: {talker} has another tokenizer \(sha \w+\) than .* of student")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("tokenizer.model", r"has tokenizer\.model and no tokenizer\.json, .* save it there"),
        (None, r"knows 300 ids, and the tokenizer of student has 512"),
    ],
)
def test_a_teacher_of_elsewhere_whose_tokenizer_is_not_known(file, says, refused, talker, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for path in (*talker.glob("*.safetensors"), talker / "config.json"):
        shutil.copy(path, folder)
    if file:
        (folder / file).write_bytes(b"sentencepiece")
    words = [*STUDENT, f"stages.student.learns_from={folder}"]
    refused(words, rf"^stages\.student\.learns_from: {folder} {says}")


def test_a_teacher_of_another_line_of_stages(refused, talker):
    words = [*STUDENT, *OTHER_LINE, f"stages.other.starts_from={talker}", "stages.other.evaluate=false"]
    refused(words, r"^stages\.student\.learns_from: other has another tokenizer")


def test_a_model_to_sample_from_with_another_tokenizer(refused, talker):
    words = [STUDENT[0], "+stage@stages.sample=sample", f"stages.sample.models=[sft,{talker}]"]
    refused(words, rf"^stages\.sample\.models: {talker} has another tokenizer")


def test_too_few_rows_of_the_last_stage(refused):
    words = [*STUDENT, *AFTER_IT, "stages.last.data.max_epochs=1e-3"]
    refused(words, r"^stages\.last\.data\.sources\.\w+: would be seen .* raise stages\.last\.data\.max_epochs")
