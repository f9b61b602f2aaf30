"""Sampling from a committee, judging, selecting and training on what is left: a real run, killed in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from lightning_llm import compose, run
from lightning_llm.data.token_store import TokenStore
from lightning_llm.report import report
from lightning_llm.stages.samples import read_rows

ROOT = Path(__file__).parents[2]
WORDS = [
    "stages.sample.models=[sft,dpo]",
    "stages.sample.prompts=800",
    "stages.sample.per_prompt=3",
    "stages.sample.max_new_tokens=24",
    "judge@stages.score.judge=weighted",
    "~stages.score.judge.parts.length",
    "+judge@stages.score.judge.parts.chance.judge=random",  # models of this size say nothing that could be right
    "stages.best.minimum_score=0.6",
    "stages.best.keep=0.5",
    "stages.best.balance=difficulty",
    "stages.rejection.data.max_epochs=1e3",
    "until=rejection",
]


def without(words: list[str]) -> list[str]:
    """Overrides of the finished run for a recipe that leaves its last two stages out."""
    return [word for word in words if not word.startswith(("stages.reward_model", "stages.online_dpo"))]


class Program:
    """The command line in a copy of the finished run's store."""

    def __init__(self, folder: Path, own: list[str]):
        self.folder = folder
        self.words = ["run", "recipe=rejection_sampling", *without(own), *WORDS]

    def start(self) -> subprocess.Popen:
        program = [sys.executable, "-m", "lightning_llm.cli", *self.words]
        return subprocess.Popen(
            program,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def run(self) -> tuple[Path, str]:
        """The folder of a run to its end, and what the console said."""
        started = self.start()
        output, said = started.communicate(timeout=240)
        assert started.returncode == 0, said
        return Path(output.splitlines()[-1]), said


@pytest.fixture(scope="module")
def killed(tmp_path_factory, beside):
    """A run that was killed while the second model was sampled, and the one that followed: (folder, what was said)."""
    program = Program(folder := tmp_path_factory.mktemp("killed"), beside(folder))
    started = program.start()
    making = program.folder / "artifacts" / ".making"
    while started.poll() is None and not [p for p in making.glob("generate-*/parts/1.jsonl") if p.stat().st_size]:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.communicate(timeout=30)
    assert started.returncode == -signal.SIGKILL
    [part] = making.glob("generate-*/parts/1.jsonl")
    written = part.read_bytes().count(b"\n")
    assert 0 < written < 800
    folder, said = program.run()
    assert not list(making.iterdir())
    return folder, said


def test_what_was_sampled_before_the_kill_is_kept(killed):
    _, said = killed
    assert "sft: 800 of 800 prompts were answered before" in said
    [continued] = re.findall(r"dpo: (\d+) of 800 prompts were answered before", said)
    assert int(continued) % 170 == 0  # whole chunks, of 510 responses each


def test_the_samples_are_those_of_a_run_that_nobody_killed(killed, tmp_path, beside):
    whole, said = Program(tmp_path, beside(tmp_path)).run()
    assert "answered before" not in said
    for name in ("samples.jsonl", "verdicts.jsonl", "rows.jsonl", "table.json"):
        node = {"samples.jsonl": "sample", "verdicts.jsonl": "score"}.get(name, "best")
        paths = [folder / "artifacts" / node / name for folder in (whole, killed[0])]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_is_learnt_is_what_was_judged_best(killed):
    artifacts = killed[0] / "artifacts"
    samples, verdicts = (list(read_rows(artifacts / f)) for f in ("sample/samples.jsonl", "score/verdicts.jsonl"))
    best = {}
    for sample, verdict in zip(samples, verdicts, strict=True):
        scored = zip(sample["responses"], (v["score"] for v in verdict["verdicts"]), strict=True)
        complete = [
            (score, response["text"])
            for response, score in scored
            if response["is_complete"] and response["text"].strip()
        ]
        best[sample["prompt"][0]["content"]] = max(complete, default=(0.0, ""))
    possible = {prompt for prompt, (score, _) in best.items() if score >= 0.6}
    rows = list(read_rows(artifacts / "best" / "rows.jsonl"))
    assert len(rows) == round(len(possible) / 2)
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        assert (row["score"], answer) == best[question]
    table = json.loads((artifacts / "best" / "table.json").read_text())
    assert {model: entry["kept"] for model, entry in table["models"].items()} == Counter(row["model"] for row in rows)
    prepared = artifacts / "rejection.prepare" / "sources" / "best"
    assert sum(TokenStore.open(prepared / split).rows for split in ("train", "validation")) == len(rows)
    record = json.loads((artifacts / "rejection" / "stage.json").read_text())
    assert record["ledger"]["best"] > 0
    assert record["inputs"]["starts_from"]["key"] == json.loads((artifacts / "sft" / "stage.json").read_text())["key"]


def test_the_page_tells_who_won(killed, tmp_path):
    page = report([killed[0]], tmp_path / "page.html").read_text()
    assert "Who won where" in page
    assert "among the best" in page
    assert "sample: sampling" in page
    assert "## Who won where: best" in (tmp_path / "page.md").read_text()


def test_a_committee_teaches_itself_for_two_rounds(beside, tmp_path):
    """Rows and pairs out of the same samples, each learnt from; the second round asks what the first has taught."""
    own = beside(tmp_path)
    inside = "stages.itec.stages"
    words = [f"{inside}.sample.prompts=120", f"{inside}.sample.per_prompt=2", f"{inside}.sample.max_new_tokens=24"]
    words += [
        f"judge@{inside}.score.judge=weighted",
        f"~{inside}.score.judge.parts.length",
        f"+judge@{inside}.score.judge.parts.chance.judge=random",
        f"{inside}.best.minimum_score=0.2",
        f"{inside}.pairs.minimum_score=0",
    ]
    words += [f"{inside}.{name}.data.max_epochs=1e3" for name in ("distilled", "preferred")]
    for stage in ("stages.rlhf", f"{inside}.reinforced"):
        words += [f"{stage}.examples=8", f"{stage}.rollout.prompts=4", f"{stage}.rollout.max_new_tokens=8"]
    record = run(compose("itec", overrides=[*without(own), *words]), until="itec2.preferred")
    assert record.status == "done"
    assert {stage for stage, facts in record.stages.items() if facts["reused"]} >= {"sft", "dpo"}
    asked = [
        {row["prompt"][0]["content"] for row in read_rows(record.artifact(f"itec{n}.sample") / "samples.jsonl")}
        for n in (1, 2)
    ]
    assert [len(prompts) for prompts in asked] == [120, 120]
    assert not asked[0] & asked[1]  # fresh prompts in each round
    tables = [json.loads((record.artifact(f"itec{n}.best") / "table.json").read_text())["models"] for n in (1, 2)]
    taught = [f"itec1.{member}" for member in ("distilled", "preferred", "reinforced")]
    assert [list(table) for table in tables] == [["sft", "dpo", "rlhf"], taught]
    for member in ("preferred", "reinforced"):  # what the committee has found reaches all of its members
        record_of_member = json.loads((record.artifact(f"itec1.{member}") / "stage.json").read_text())
        distilled = json.loads((record.artifact("itec1.distilled") / "stage.json").read_text())
        assert record_of_member["inputs"]["starts_from"]["key"] == distilled["key"]
    pairs = list(read_rows(record.artifact("itec2.pairs") / "rows.jsonl"))
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    ledger = json.loads((record.artifact("itec2.preferred") / "stage.json").read_text())["ledger"]
    assert ledger["pairs"] > 0
    assert "rewards/accuracies" in record.stages["itec2.preferred"]["metrics"]
    again = run(record.plan.recipe, until="itec2.preferred")
    assert all(facts["reused"] for facts in again.stages.values())
