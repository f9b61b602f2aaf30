"""The verb generate: responses of one model, or of a committee, to prompts.

Leaves `samples.jsonl`: a row for each prompt with the responses of all models, their ids, and each token's
log-probability in what it was drawn from. A response depends on the seed, its prompt's place and its own number, so
what an interrupted run has written is continued, and nobody can tell.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.data.turns import draw_places
from lightning_llm.evaluation.judges import Question, Response
from lightning_llm.evaluation.questions import read_question
from lightning_llm.generation.engine import Sampler
from lightning_llm.generation.vllm import VLLMSampler
from lightning_llm.models import Transformer
from lightning_llm.models.families import read_config
from lightning_llm.models.kernels import use_attention
from lightning_llm.models.size import forward_flops
from lightning_llm.settings import UserError
from lightning_llm.stages.config import GenerateSettings
from lightning_llm.stages.context import StageContext, StageResult, model_directory, refuse_other_tokenizer, threads
from lightning_llm.stages.samples import SAMPLES, Json, Sampled, grow_rows, read_rows, write_rows

TOGETHER = 512  # responses between two writes: places are filled again and again, and little is lost with a kill


@dataclass(frozen=True)
class Asked:
    """A prompt that is sampled."""

    question: Question
    messages: list[dict[str, str]]


def run(context: StageContext) -> StageResult:
    """Sample from each model in turn, on one device.

    Raises:
        UserError: the models and the prompts have different tokenizers, or there is nothing to be asked.
    """
    refuse_other_tokenizer(f"stages.{context.name}.models", context.inputs)
    settings: GenerateSettings = context.settings
    device = "cuda" if context.compute.accelerator == "gpu" else "cpu"
    directories = [model_directory(context.inputs[f"model.{number}"]) for number in range(len(settings.models))]
    asked = choose_prompts(context, settings, min(read_config(path).max_position_embeddings for path in directories))
    parts = [context.output / "parts" / f"{number}.jsonl" for number in range(len(directories))]
    count, metrics, seconds = len(asked) * settings.per_prompt, {}, {}
    with (
        torch.inference_mode(),
        torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"),
        threads(context.compute.threads),
    ):
        for number, (directory, part) in enumerate(zip(directories, parts, strict=True)):
            began = time.perf_counter()
            member = Member(context, directory, number, asked)
            chunk = max(TOGETHER // settings.per_prompt, 1)
            for done in grow_rows(part, len(asked), chunk, member.sample):
                if done and member.is_idle:
                    context.console.note(
                        f"{settings.models[number]}: {done} of {len(asked)} prompts were answered before"
                    )
                context.console.update(number * count + done * settings.per_prompt, len(directories) * count, "samples")
            seconds[settings.models[number]] = time.perf_counter() - began
    measured = Measured(settings.models)
    write_rows(context.output / SAMPLES, gathered(asked, parts, settings.models, measured))
    shutil.rmtree(context.output / "parts")
    fingerprint = (context.inputs["data"] / "tokenizer_fingerprint").read_text("utf-8")
    (context.output / "tokenizer_fingerprint").write_text(fingerprint, "utf-8")
    flops = sum(
        forward_flops(read_config(directory), measured.segments[model])
        for model, directory in zip(settings.models, directories, strict=True)
    )
    metrics = {"prompts": len(asked), "samples": count * len(directories), **measured.metrics()}
    return StageResult(metrics, measured.tokens, flops, seconds)


# ---- prompts ----


def choose_prompts(context: StageContext, settings: GenerateSettings, longest: int) -> list[Asked]:
    """The prompts of this round, in the seed's order.

    Args:
        longest: tokens that all models can read; a prompt leaves room for one more at least.

    Raises:
        UserError: none is left.
    """
    folders = {name: context.inputs["data"] / "sources" / name / "train" for name in settings.weights}
    stores = {name: TokenStore.open(folder) for name, folder in folders.items()}
    places = draw_places(
        {name: store.rows for name, store in stores.items()},
        settings.weights,
        settings.prompts,
        settings.round,
        settings.seed,
    )
    if len(places) < settings.prompts:
        context.console.note(f"{len(places)} prompts are there, {settings.prompts} were asked for")
    contents = {name: store.metadata() for name, store in stores.items()}
    asked = []
    for source, row in places:
        content = contents[source][row]
        asked.append(Asked(read_question(stores[source], row, content), content["prompt"]))
    fit = [prompt for prompt in asked if len(prompt.question.prompt_ids) < longest]
    if len(fit) < len(asked):
        context.console.note(f"{len(asked) - len(fit)} prompts fill the context of {longest} tokens and are left out")
    if not fit:
        raise UserError("data.sources", "hold no prompt that can be asked", "Give them rows, or shorter ones")
    return fit


# ---- samples ----


class Member:
    """A model of the committee; its weights are read when it is first asked."""

    def __init__(self, context: StageContext, directory: Path, number: int, asked: Sequence[Asked]):
        self.context, self.directory, self.number, self.asked = context, directory, number, asked
        self.settings: GenerateSettings = context.settings
        self.tokenizer = Tokenizer.load(context.inputs["tokenizer"] / "tokenizer")
        self.config = read_config(directory)
        self._sampler: Sampler | VLLMSampler | None = None

    @property
    def is_idle(self) -> bool:
        """Nothing has been asked of it yet."""
        return self._sampler is None

    def sample(self, first: int, end: int) -> list[Json]:
        """Its responses to a chunk of the prompts: a row for each prompt."""
        sampler, settings = self._loaded(), self.settings
        prompts = [prompt.question.prompt_ids for prompt in self.asked[first:end]]
        room = self.config.max_position_embeddings
        longest = min(max(map(len, prompts)) + settings.max_new_tokens, room)
        options: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "stop_ids": self.tokenizer.stop_ids,
            "samples": settings.per_prompt,
            "sampling": settings.sampling.resolved(),
            "seed": seed_of(settings.seed, self.number, settings.round, first),
        }
        if isinstance(sampler, Sampler):
            options |= {"batch_size": max(self.context.compute.micro_batch_tokens // longest, 1), "context": room}
            options |= {"stops": settings.stop, "decode_ids": self.tokenizer.decode}
        responses = []
        for drawn in sampler.sample(prompts, **options):
            has_stop_token = bool(drawn.ids) and drawn.ids[-1] in self.tokenizer.stop_ids
            text = self.tokenizer.decode(drawn.ids[:-1] if has_stop_token else drawn.ids)
            if drawn.is_stopped:
                text = text[: min(text.find(stop) for stop in settings.stop if stop in text)]
            is_complete = has_stop_token or drawn.is_stopped
            responses.append({"text": text, "ids": drawn.ids, "logps": drawn.logps, "is_complete": is_complete})
        each = settings.per_prompt
        return [{"responses": responses[at : at + each]} for at in range(0, len(responses), each)]

    def _loaded(self) -> Sampler | VLLMSampler:
        if self._sampler is None:
            compute, precision = self.context.compute, self.settings.precision
            if self.settings.engine == "vllm":
                dtype = "bfloat16" if precision == "bf16" else "float32"
                self._sampler = VLLMSampler(self.directory, context=self.config.max_position_embeddings, dtype=dtype)
                return self._sampler
            model = Transformer.from_pretrained(self.directory).eval()
            model = model.to("cuda" if compute.accelerator == "gpu" else "cpu")
            use_attention(model, compute, precision=precision, needs_gradient=False)
            self._sampler = Sampler(model)
        return self._sampler


def seed_of(seed: int, model: int, turn: int, first: int) -> int:
    """The engine's seed for a chunk of prompts: no two chunks, models or rounds share their random numbers."""
    digest = hashlib.blake2b(f"{seed} {model} {turn} {first}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


# ---- what is left ----


class Measured:
    """What is counted while the samples are gathered, by model."""

    def __init__(self, models: Sequence[str]):
        self.tokens = dict.fromkeys(models, 0)  # prompts, once each, and responses
        self.segments: dict[str, list[tuple[int, int]]] = {model: [] for model in models}  # (length, prefix)
        self._complete: list[bool] = []
        self._lengths: list[int] = []

    def add(self, model: str, prompt: int, responses: Sequence[Response]) -> None:
        """Count the responses of a model to a prompt of so many tokens."""
        lengths = [len(response.ids) for response in responses]
        self.segments[model] += [(prompt, 0), *((length, prompt) for length in lengths)]
        self.tokens[model] += prompt + sum(lengths)
        self._complete += [response.is_complete for response in responses]
        self._lengths += lengths

    def metrics(self) -> dict[str, float]:
        """Of all models together."""
        complete, length = float(np.mean(self._complete)), float(np.mean(self._lengths))
        return {"responses/complete": complete, "responses/length": length}


def gathered(
    asked: Sequence[Asked], parts: Sequence[Path], models: Sequence[str], measured: Measured
) -> Iterator[Json]:
    """The rows of samples.jsonl: of each prompt the responses of all models, in their order."""
    for prompt, *rows in zip(asked, *map(read_rows, parts), strict=True):
        responses, logps, whose = [], [], []
        for model, row in zip(models, rows, strict=True):
            said_by = [Response(each["ids"], each["text"], each["is_complete"]) for each in row["responses"]]
            measured.add(model, len(prompt.question.prompt_ids), said_by)
            responses += said_by
            logps += [each["logps"] for each in row["responses"]]
            whose += [model] * len(said_by)
        yield Sampled(prompt.question, prompt.messages, responses, whose).to_json(logps)
