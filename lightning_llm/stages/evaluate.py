"""The verb evaluate: what a model has learnt, on held-out text, questions and pairs, alone and against its predecessor.

Leaves `metrics.json` (the same figures as in stage.json), `loss_by_position.json`, `samples.json`, and `needle.json` if
keys are hidden. Nothing is kept between stages: the predecessor answers the same questions anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.evaluation.judges import Question, Response, StyleAndCorrectness, verify
from lightning_llm.evaluation.needle import chance_of, found, grid_of, hide, needle_metrics
from lightning_llm.evaluation.perplexity import (
    late_loss,
    losses_by_position,
    mean_loss,
    perplexity,
    position_curve,
    sample_text,
    sample_windows,
)
from lightning_llm.evaluation.preference import kl_to_reference, preference_accuracy, response_logps, sample_pairs
from lightning_llm.evaluation.tasks import respond, sample_questions, task_metrics
from lightning_llm.evaluation.win_rate import judge_metrics
from lightning_llm.models import Transformer
from lightning_llm.models.kernels import use_attention
from lightning_llm.models.size import forward_flops_per_token
from lightning_llm.settings import UserError
from lightning_llm.stages.config import EvaluateRewardsSettings, EvaluateSettings
from lightning_llm.stages.context import (
    LAST,
    StageContext,
    StageResult,
    model_directory,
    refuse_other_tokenizer,
    threads,
)
from lightning_llm.stages.evaluate_rewards import evaluate_rewards
from lightning_llm.training.phases import Phases

TEMPERATURE = 1.0  # of the responses that are judged: the policies themselves, not what is likeliest under them
KL_SAMPLES = 200  # a fifteenth of their standard deviation is what the mean errs by
VERDICTS = {1.0: "win", 0.5: "tie", 0.0: "loss", None: "both wrong"}


def run(context: StageContext) -> StageResult:
    """Measure a model on one device.

    Raises:
        UserError: model, data and tokenizer do not belong together.
    """
    if isinstance(context.settings, EvaluateRewardsSettings):
        return evaluate_rewards(context)
    settings: EvaluateSettings = context.settings
    device = "cuda" if context.compute.accelerator == "gpu" else "cpu"
    phases = Phases()
    evaluation = Evaluation(context, device)
    with (
        torch.inference_mode(),
        torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"),
        threads(context.compute.threads),
    ):
        parts = {
            "text": evaluation.measure_text,
            "tasks": evaluation.measure_tasks,
            "preferences": evaluation.measure_preferences,
            "needles": evaluation.measure_needles,
        }
        for done, (name, measure) in enumerate(parts.items()):
            context.console.update(done, len(parts), "parts")
            with phases(name):
                measure()
    evaluation.write("metrics.json", evaluation.metrics)
    flops = evaluation.tokens * forward_flops_per_token(evaluation.model.config, settings.context)
    return StageResult(dict(evaluation.metrics), flops=flops, seconds=phases.seconds)


class Evaluation:
    """One model's evaluation: what is asked of it twice is kept, figures gather in `metrics`."""

    def __init__(self, context: StageContext, device: str):
        self.context, self.device = context, device
        self.settings: EvaluateSettings = context.settings
        self.sizes = self.settings.evaluation
        self.max_tokens = context.compute.micro_batch_tokens
        self.tokenizer = Tokenizer.load(context.inputs["tokenizer"] / "tokenizer")
        self.metrics: dict[str, float] = {}
        self.tokens = 0  # that went through a model
        self._refuse_mismatch()

    @cached_property
    def model(self) -> Transformer:
        """The evaluated model, on the device."""
        return self._load("model")

    @cached_property
    def predecessor(self) -> Transformer | None:
        """The model that the evaluated stage started from."""
        return self._load("starts_from") if "starts_from" in self.context.inputs else None

    @cached_property
    def last(self) -> Transformer | None:
        """Where the evaluated model is an average of weights: the last of them."""
        directory = self.context.inputs["model"] / LAST
        return self._open(directory) if directory.is_dir() else None

    # ---- text ----

    def measure_text(self) -> None:
        """perplexity/* at the recipe's first context; at the stage's own loss_by_position.json and late_loss/*.

        Of an average of weights also last/perplexity/*, of what it was trained to.
        """
        stores = self._stores("text")
        context, full_context = self.settings.context, self.settings.full_context
        for domain, store in stores.items():
            documents = sample_text(store, self.sizes.text_tokens)
            if documents:
                loss = mean_loss(self.model, documents, context, self.max_tokens)
                self.metrics[f"perplexity/{domain}"] = perplexity(float(loss.compute()))
                self.tokens += sum(map(len, documents))
                if self.last is not None:
                    loss = mean_loss(self.last, documents, context, self.max_tokens)
                    self.metrics[f"last/perplexity/{domain}"] = perplexity(float(loss.compute()))
                    self.tokens += sum(map(len, documents))
        windows = sample_windows(stores, full_context, self.sizes.long_documents)
        if not windows:
            self.context.console.note(f"no held-out document has {full_context} tokens: no loss by position")
            return
        losses = losses_by_position(self.model, windows, self.max_tokens)
        self.tokens += len(windows) * full_context
        curve = {"context": full_context, "windows": len(windows), **position_curve(losses)}
        self.write("loss_by_position.json", curve)
        if full_context > context:
            late = late_loss(self.model, windows, losses, context, self.max_tokens)
            self.tokens += 2 * len(windows) * full_context  # half of them, four times as many with those before them
            self.metrics |= {"late_loss/full": late.full, "late_loss/short": late.short, "late_loss/gain": late.gain}
            self.metrics["late_loss/gain_error"] = late.gain_error

    # ---- tasks ----

    def measure_tasks(self) -> None:
        """tasks/*, responses/*, judge/* and kl/reference; samples.json."""
        questions = sample_questions(self._stores("tasks"), self.sizes.questions)
        if not questions:
            return
        greedy = self._respond(self.model, questions, temperature=0.0)
        self.metrics |= task_metrics(questions, greedy)
        if self.predecessor is None:
            self._write_samples(questions, greedy)
            return
        # Both models answer at temperature 1 with the same random numbers: a greedy answer would hide in which share of
        # its responses a model has a style, and that share is what preference training changes.
        drawn = self._respond(self.model, questions, temperature=TEMPERATURE)
        others = self._respond(self.predecessor, questions, temperature=TEMPERATURE)
        judge = StyleAndCorrectness()
        scores = [judge.compare(*game) for game in zip(questions, drawn, others, strict=True)]
        self.metrics |= judge_metrics(scores, seed=self.settings.seed)
        self._write_samples(questions, drawn, others, scores)
        if self._has_reference:
            prompts = [question.prompt_ids for question in questions[:KL_SAMPLES]]
            responses = [[response.ids] for response in drawn[:KL_SAMPLES]]
            policy, reference = (
                self._response_logps(model, prompts, responses)[:, 0] for model in (self.model, self.predecessor)
            )
            self.metrics["kl/reference"] = kl_to_reference(policy, reference)

    # ---- preferences ----

    def measure_preferences(self) -> None:
        """preference/accuracy: by implicit reward after preference training, by likelihood per token elsewhere."""
        stores = self._stores("pairs")
        each = math.ceil(self.sizes.preference_pairs / max(len(stores), 1))
        pairs = [pair for store in stores.values() for pair in sample_pairs(store, each, self.settings.full_context)]
        if not pairs:
            return
        prompts, responses = [pair.prompt for pair in pairs], [pair.responses for pair in pairs]
        policy = self._response_logps(self.model, prompts, responses)  # [P, 2]
        if self._has_reference and self.predecessor is not None:
            scores = policy - self._response_logps(self.predecessor, prompts, responses)
        else:
            scores = policy / torch.tensor([[len(chosen), len(rejected)] for chosen, rejected in responses])
        self.metrics["preference/accuracy"] = preference_accuracy(scores)

    # ---- needles ----

    def measure_needles(self) -> None:
        """needle/<length>, and needle.json: where in how long a text a key is found again."""
        config = self.sizes.needle
        if not config.trials:
            return
        stores = list(self._stores("text").values())
        documents = [document for store in stores for document in sample_text(store, self.settings.full_context)]
        if not documents:
            self.context.console.note("there is no held-out text to hide a key in")
            return
        longest, haystack = self.settings.full_context, np.concatenate(documents)
        needles = hide(self.tokenizer, haystack, config, longest, self.settings.seed)
        if not needles:
            self.context.console.note(f"a key and some text around it need more than {longest} tokens: none is hidden")
            return
        grid = grid_of(needles, found(self.model, needles, config.answer, self.max_tokens))
        self.tokens += sum(len(needle.prompt) for needle in needles)
        self.write("needle.json", grid | {"answer": config.answer, "chance": chance_of(config)})
        self.metrics |= needle_metrics(grid)

    # ---- files ----

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file of the artifact."""
        (self.context.output / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def _write_samples(
        self,
        questions: list[Question],
        responses: list[Response],
        others: list[Response] | None = None,
        scores: list[float | None] | None = None,
    ) -> None:
        """The first few conversations, which are of different tasks."""
        samples = []
        for i, (question, response) in enumerate(list(zip(questions, responses, strict=True))[: self.sizes.samples]):
            sample = {
                "task": question.task,
                "prompt": question.prompt,
                "reference": f"answer: {question.answer}",
                "response": response.text,
                "right": verify(question, response),
                "starts_from": None,
                "verdict": None,
            }
            if others is not None and scores is not None:
                sample |= {
                    "starts_from": others[i].text,
                    "starts_from_right": verify(question, others[i]),
                    "verdict": VERDICTS[scores[i]],
                }
            samples.append(sample)
        self.write("samples.json", samples)

    # ---- inputs ----

    @property
    def _has_reference(self) -> bool:
        return self.settings.preference_mode == "implicit_reward"

    def _stores(self, group: str) -> dict[str, TokenStore]:
        """Held-out stores of `text`, `tasks` or `pairs`, by source."""
        folder = self.context.inputs["data"] / "sources" / group
        found = sorted(folder.glob("*/validation/store.json")) if folder.is_dir() else []
        return {path.parts[-3]: TokenStore.open(path.parent) for path in found}

    def _load(self, role: str) -> Transformer:
        return self._open(model_directory(self.context.inputs[role]))

    def _open(self, directory: Path) -> Transformer:
        model = Transformer.from_pretrained(directory).eval().to(self.device)
        use_attention(model, self.context.compute, precision=self.settings.precision, needs_gradient=False)
        return model

    def _respond(self, model: Transformer, questions: list[Question], *, temperature: float) -> list[Response]:
        responses = respond(
            model,
            questions,
            decode=self.tokenizer.decode,
            stop_ids=self.tokenizer.stop_ids,
            max_new_tokens=self.sizes.max_new_tokens,
            max_tokens=self.max_tokens,
            temperature=temperature,
            seed=self.settings.seed,
        )
        self.tokens += sum(len(q.prompt_ids) + len(r.ids) for q, r in zip(questions, responses, strict=True))
        return responses

    def _response_logps(
        self, model: Transformer, prompts: Sequence[ArrayLike], responses: Sequence[Sequence[ArrayLike]]
    ) -> torch.Tensor:
        self.tokens += sum(map(np.size, prompts)) + sum(np.size(each) for group in responses for each in group)
        return response_logps(model, prompts, responses, self.max_tokens)

    def _refuse_mismatch(self) -> None:
        inputs, where = self.context.inputs, f"evaluation of {self.context.name}"
        if self._has_reference and "starts_from" not in inputs:
            raise UserError(where, "implicit rewards need the model that the stage started from", "Name starts_from")
        refuse_other_tokenizer(where, inputs)
