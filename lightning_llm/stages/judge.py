"""The verb judge: a verdict on every response that was sampled.

Leaves `verdicts.jsonl`: a row for each row of the samples, in their order, with a verdict on each response. A verdict
depends on question and response alone, so what an interrupted run has written is continued.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lightning_llm.evaluation.config import JudgeConfig
from lightning_llm.evaluation.judges import Judge, JudgeContext
from lightning_llm.models.families import read_config
from lightning_llm.models.size import ScoreHead, forward_flops
from lightning_llm.settings import UserError
from lightning_llm.stages.config import JudgeSettings
from lightning_llm.stages.context import StageContext, StageResult, model_directory, refuse_other_tokenizer, threads
from lightning_llm.stages.samples import SAMPLES, VERDICTS, Json, Sampled, grow_rows, read_rows

TOGETHER = 64  # prompts between two writes
JudgingCost = Callable[[Sequence[tuple[int, int]]], float]  # FLOPs of segments, given as (tokens, tokens of the prefix)


def run(context: StageContext) -> StageResult:
    """Judge the samples of all inputs, one after the other.

    Raises:
        UserError: a reward model has another tokenizer than the samples, or a judge lacks what it needs.
    """
    settings: JudgeSettings = context.settings
    samples = numbered(context.inputs, "samples")
    judge, device = build_judge(context, samples), device_of(context)
    total = sum(1 for path in samples for _ in read_rows(path / SAMPLES))
    cost = judging_cost(context)
    if not total:
        raise UserError(f"stages.{context.name}.data", "names stages without samples", "Sample some")
    rows = itertools.chain.from_iterable(read_rows(path / SAMPLES) for path in samples)
    with (
        torch.inference_mode(),
        torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"),
        threads(context.compute.threads),
    ):
        reader = Reader(rows)
        verdicts = context.output / VERDICTS
        for done in grow_rows(verdicts, total, TOGETHER, lambda first, end: judged(judge, reader.rows(first, end))):
            if done and not reader.read:
                context.console.note(f"{done} of {total} prompts were judged before")
            context.console.update(done, total, "prompts")
    rows = (row for path in samples for row in read_rows(path / SAMPLES))
    return StageResult(
        metrics_of(read_rows(verdicts)), flops=sum(cost(segments_of(row)) for row in rows) if cost else 0
    )


def build_judge(context: StageContext, data: Sequence[Path]) -> Judge:
    """The judge of a stage's settings, with the reward models among its inputs.

    Args:
        data: artifacts whose tokens the reward models will read.

    Raises:
        UserError: a reward model has another tokenizer, or the judge lacks what it needs.
    """
    models = numbered(context.inputs, "reward_model")
    judging = {f"model.{number}": path for number, path in enumerate(models)}
    for path in data:
        refuse_other_tokenizer(f"stages.{context.name}.judged_by", {"data": path, **judging})
    directories, most = [model_directory(path) for path in models], context.compute.micro_batch_tokens
    config: JudgeConfig = context.settings.judge
    return config.build(JudgeContext(directories, device_of(context), most, context.settings.seed))


def judging_cost(context: StageContext) -> JudgingCost | None:
    """What the reward models among a stage's inputs compute for a prompt with its responses; None: there are none."""
    shapes = [read_config(model_directory(path)) for path in numbered(context.inputs, "reward_model")]
    head = ScoreHead()  # scores alone: nobody asks for grades

    def cost(segments: Sequence[tuple[int, int]]) -> float:
        return sum(forward_flops(shape, segments, head) for shape in shapes)

    return cost if shapes else None


def segments_of(row: Json) -> list[tuple[int, int]]:
    """(tokens, tokens of its prefix) of the prompt of a row of samples and of its responses."""
    prompt = len(row["prompt_ids"])
    return [(prompt, 0), *((len(response["ids"]), prompt) for response in row["responses"])]


def device_of(context: StageContext) -> str:
    """Where models of a stage compute that are not trained."""
    return "cuda" if context.compute.accelerator == "gpu" else "cpu"


def numbered(inputs: Mapping[str, Path], role: str) -> list[Path]:
    """The inputs `<role>.0`, `<role>.1` and so on."""
    count = sum(name.partition(".")[0] == role for name in inputs)
    return [inputs[f"{role}.{number}"] for number in range(count)]


class Reader:
    """Rows of a stream by their numbers, which only grow."""

    def __init__(self, rows: Iterable[Json]):
        self._rows, self.read = iter(rows), 0

    def rows(self, first: int, end: int) -> list[Json]:
        """Rows `first` up to `end`; those before are passed over."""
        found = list(itertools.islice(self._rows, first - self.read, end - self.read))
        self.read = end
        return found


def judged(judge: Judge, rows: list[Json]) -> list[Json]:
    """A row of verdicts for each row of samples; all responses are handed to the judge together."""
    samples = [Sampled.from_json(row) for row in rows]
    questions = [sampled.question for sampled in samples for _ in sampled.responses]
    responses = [response for sampled in samples for response in sampled.responses]
    verdicts = iter(judge(questions, responses))
    return [{"verdicts": [vars(next(verdicts)) for _ in sampled.responses]} for sampled in samples]


def metrics_of(rows: Iterator[Json]) -> dict[str, float]:
    """The mean score, its mean over the prompts' best responses, and the mean of each part."""
    count = prompts = 0
    best = 0.0
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        for verdict in row["verdicts"]:
            count += 1
            for name, value in {"score/mean": verdict["score"], **prefixed(verdict["parts"])}.items():
                sums[name] += value
        prompts += 1
        best += max(verdict["score"] for verdict in row["verdicts"])
    means = {name: value / count for name, value in sums.items()}
    return {"prompts": prompts, "responses": count, "score/best": best / prompts, **means}


def prefixed(parts: Mapping[str, float]) -> dict[str, float]:
    """Names of parts as names of metrics."""
    return {f"score/{name}": value for name, value in parts.items()}
