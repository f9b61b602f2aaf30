"""An SFT model stopped half-way, which can still learn from its own answers, and what is measured of it and of other
models: held-out questions, answered greedily and drawn at temperature 1."""

from __future__ import annotations

import hashlib
import json
import statistics
from functools import cached_property
from pathlib import Path
from typing import Any

import machine
import torch
from trials import read

from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.evaluation.config import ExactAnswerConfig, RewardModelJudgeConfig, SubstringConfig
from lightning_llm.evaluation.judges import JudgeContext, Response
from lightning_llm.evaluation.preference import kl_to_reference, response_logps
from lightning_llm.evaluation.tasks import respond, sample_questions, task_metrics
from lightning_llm.models import Transformer

TASKS = ("reverse", "sort", "largest", "sum")
QUESTIONS = 1000  # held out, of the four tasks alike
ASKED = [f"+evaluation.tasks.sources.{task}.options.questions={QUESTIONS // len(TASKS)}" for task in TASKS]
HALF_WAY = ["stages.sft.examples=17500", *ASKED]  # of 21,000: five sixths of SFT
EXACT, DRAWN, KL = "tasks/exact_match", "reward/exact_answer", "kl/sft"
MODELLED = "reward/reward_model"
MAX_NEW_TOKENS, MAX_TOKENS = 48, 4096  # of a response; of a pass
MEASURED = machine.REPOSITORY / "build" / "measured"  # figures of models that were measured before


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
        reward/reward_model   mean score by the run's reward model, if it has one
        kl/sft                KL divergence from the SFT model, nats per response
        responses/length      tokens of a drawn answer
        """
        roles = (stage, "sft", "evaluation.prepare", "reward_model")
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
        judges = {DRAWN: ExactAnswerConfig(), "reward/substring": SubstringConfig()}
        if (reward_model := self.artifacts / "reward_model").exists():
            judges[MODELLED] = RewardModelJudgeConfig()
        context = JudgeContext(reward_models=[reward_model / "model"], max_tokens=MAX_TOKENS)
        for name, config in judges.items():
            verdicts = config.build(context)(self.questions, drawn)
            found[name] = statistics.fmean(verdict.score for verdict in verdicts)
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
