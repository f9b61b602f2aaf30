"""An SFT model stopped half-way, which can still learn from its own answers; runs that go on from it, and what is
measured of them: held-out questions, answered greedily and drawn at temperature 1."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import machine
import torch
from learning import spread

from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.evaluation.config import ExactAnswerConfig, SubstringConfig
from lightning_llm.evaluation.judges import JudgeContext, Response
from lightning_llm.evaluation.preference import kl_to_reference, response_logps
from lightning_llm.evaluation.tasks import respond, sample_questions, task_metrics
from lightning_llm.models import Transformer

TASKS = ("reverse", "sort", "largest", "sum")
QUESTIONS = 1000  # held out, of the four tasks alike
HALF_WAY = [
    "stages.sft.examples=17500",  # of 21,000: five sixths of SFT
    *(f"+evaluation.tasks.sources.{task}.options.questions={QUESTIONS // len(TASKS)}" for task in TASKS),
]
EXACT, DRAWN, KL = "tasks/exact_match", "reward/exact_answer", "kl/sft"
MAX_NEW_TOKENS, MAX_TOKENS = 48, 4096  # of a response; of a pass
MEASURED = machine.REPOSITORY / "build" / "measured"  # figures of models that were measured before


def run(*words: str) -> Path:
    """The folder of a run; what the store holds is not made again."""
    with subprocess.Popen(machine.command("run", *words), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [line.strip() for line in process.stdout]
    if process.returncode:
        sys.exit(f"{' '.join(words)}: exit code {process.returncode}")
    return Path(lines[-1])


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


# ---- one model ----


class HeldOut:
    """What a run's models say to held-out questions."""

    def __init__(self, run: Path):
        self.artifacts = run / "artifacts"

    def figures(self, stage: str) -> dict[str, float]:
        """Of the model of a stage; taken from `build/measured` where the same model was measured before.

        tasks/*               exact match of greedy answers
        reward/exact_answer   mean score of an answer drawn at temperature 1: right or not
        reward/substring      the right answer stands somewhere in it
        kl/sft                KL divergence from the SFT model, nats per response
        responses/length      tokens of a drawn answer
        """
        roles = (stage, "sft", "evaluation.prepare")
        keys = [(self.artifacts / role).resolve().name for role in roles if (self.artifacts / role).exists()]
        kept = MEASURED / f"{hashlib.blake2b(' '.join(keys).encode(), digest_size=8).hexdigest()}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(self._measured(stage)) + "\n", "utf-8")
        return read(kept)

    @torch.inference_mode()
    def _measured(self, stage: str) -> dict[str, float]:
        policy = self._model(stage)
        greedy, drawn = self._respond(policy, 0.0), self._respond(policy, 1.0)
        found = task_metrics(self.questions, greedy)
        for config in (ExactAnswerConfig(), SubstringConfig()):
            verdicts = config.build(JudgeContext())(self.questions, drawn)
            found[f"reward/{config.name}"] = statistics.fmean(verdict.score for verdict in verdicts)
        found["responses/length"] = statistics.fmean(len(response.ids) for response in drawn)
        prompts, ids = [question.prompt_ids for question in self.questions], [[response.ids] for response in drawn]
        both = [response_logps(model, prompts, ids, MAX_TOKENS)[:, 0] for model in (policy, self._model("sft"))]
        return found | {KL: kl_to_reference(*both)}

    @cached_property
    def questions(self) -> list[Any]:
        """Held out, tasks in turns."""
        stores = (self.artifacts / "evaluation.prepare" / "sources" / "tasks").glob("*/validation")
        return sample_questions({path.parent.name: TokenStore.open(path) for path in sorted(stores)}, QUESTIONS)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.artifacts / "tokenizer" / "tokenizer")

    def _model(self, stage: str) -> Transformer:
        return Transformer.from_pretrained(self.artifacts / stage / "model").eval()

    def _respond(self, model: Transformer, temperature: float) -> list[Response]:
        return respond(
            model,
            self.questions,
            decode=self.tokenizer.decode,
            stop_ids=self.tokenizer.stop_ids,
            max_new_tokens=MAX_NEW_TOKENS,
            max_tokens=MAX_TOKENS,
            temperature=temperature,
        )


# ---- several seeds ----


def spreads(per_seed: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The spread of each figure that every seed has."""
    names = [name for name in per_seed[0] if all(name in figures for figures in per_seed)]
    return {name: spread([figures[name] for figures in per_seed]) for name in names}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The spread of what each figure has changed within its seed, from spreads of the two."""
    return {
        name: spread([new - old for old, new in zip(before[name]["values"], found["values"], strict=True)])
        for name, found in after.items()
        if name in before
    }


def shown(found: Mapping[str, Any] | None, digits: int = 3, *, signed: bool = False) -> str:
    """Mean and standard deviation of a spread, as tables have them."""
    if found is None:
        return "-"
    text = f"{found['mean']:{'+' if signed else ''}.{digits}f}"
    deviation = found["standard_deviation"]
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def lines_of_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table's lines."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
