"""Our own model and loop: pre-training, bare and by Lightning; SFT, DPO and reward models by Lightning; the limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from calls import Calls, serve
from torch import nn

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.packing import Window
from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import sample
from lightning_llm.losses.likelihood import token_log_likelihood
from lightning_llm.models import Transformer
from lightning_llm.models.compilation import compile_parts
from lightning_llm.models.reward import RewardModel
from lightning_llm.objectives.base import Objective, token_logps
from lightning_llm.objectives.config import CausalLMConfig, DPOConfig, RewardModelConfig
from lightning_llm.optimization.config import AdamWConfig, LearningRateConfig
from lightning_llm.optimization.window import optimizer_step
from lightning_llm.schedules import Progress
from lightning_llm.stages.config import ComputeConfig
from lightning_llm.training.loop import fit

OPTIMIZER = AdamWConfig()


def load(calls: Calls, folder: str = "model") -> Transformer:
    return Transformer.from_pretrained(calls.settings[folder])


def documents(calls: Calls) -> Callable[[int], SegmentBatch]:
    batches = calls.settings["documents"]
    return lambda index: SegmentBatch.from_documents(batches[index])


def conversations(calls: Calls) -> Callable[[int], SegmentBatch]:
    batches = calls.settings["conversations"]

    def batch(index: int) -> SegmentBatch:
        rows = batches[index]
        masks = [[False] * len(prompt) + [True] * len(answer) for prompt, answer in rows]
        return SegmentBatch.from_documents([prompt + answer for prompt, answer in rows], masks)

    return batch


def pairs(calls: Calls) -> Callable[[int], SegmentBatch]:
    batches = calls.settings["pairs"]
    return lambda index: SegmentBatch.from_groups(
        [prompt for prompt, _, _ in batches[index]], [[chosen, rejected] for _, chosen, rejected in batches[index]]
    )


def pretrain(calls: Calls) -> None:
    """A plain loop over our optimizer step, without a trainer."""
    calls.before_building()
    model = load(calls)
    if calls.settings.get("compile"):
        compile_parts(model)  # as compute.compile does
    objective = CausalLMConfig().build(model)
    optimizer = OPTIMIZER.build(model)
    batch_of = documents(calls)
    for index in calls:
        batch = batch_of(index)
        totals = optimizer_step(
            objective.loss,
            [batch],
            optimizer,
            units=sum(batch.target_counts),
            learning_rate=calls.settings["learning_rate"],
            clip_norm=OPTIMIZER.clip_norm,
        )
        calls.done(loss=totals.means()["loss"])


def pretrain_with_lightning(calls: Calls) -> None:
    calls.before_building()
    train(calls, CausalLMConfig().build(load(calls)), documents(calls))


def sft(calls: Calls) -> None:
    calls.before_building()
    train(calls, CausalLMConfig().build(load(calls)), conversations(calls))


def dpo(calls: Calls) -> None:
    """The reference is asked in each step, or (`precomputed`) its log-probabilities are a column made before."""
    calls.before_building()
    config = DPOConfig(beta=calls.settings["beta"])
    reference, batch_of = load(calls, "reference"), pairs(calls)
    if not calls.settings.get("precomputed"):
        train(calls, config.build(load(calls), reference=reference), batch_of)
        return
    with torch.no_grad():
        columns = [token_logps(reference, batch_of(index)) for index in range(len(calls.settings["pairs"]))]
    del reference

    def with_column(index: int) -> SegmentBatch:
        batch = batch_of(index)
        batch.columns["reference_logps"] = columns[index]
        return batch

    train(calls, config.build(load(calls)), with_column)


def reward(calls: Calls) -> None:
    calls.before_building()
    model, batch_of = RewardModel.from_pretrained(calls.settings["model"]), pairs(calls)

    def with_strength(index: int) -> SegmentBatch:
        batch = batch_of(index)
        batch.columns["strength"] = torch.zeros(batch.num_segments, dtype=torch.int64)  # nobody has said any
        return batch

    train(calls, RewardModelConfig().build(model), with_strength)


class AskedFor:
    """Data for `fit`, whose window t is made when the driver asks for a call: the trainer draws it after step t - 1."""

    def __init__(self, calls: Calls, objective: Objective, batch_of: Callable[[int], SegmentBatch], steps: int):
        self.calls, self.objective, self.batch_of, self.steps = calls, objective, batch_of, steps

    def window(self, step: int, **_: Any) -> Window:
        if step:
            self.calls.done(loss=self.objective.totals.means()["loss"])
        index = self.calls.wait()
        self.objective.totals = type(self.objective.totals)()
        batch = self.batch_of(index)
        return Window(
            step,
            Progress(batch.num_tokens * (step + 1), batch.num_segments * (step + 1), step + 1),
            [batch],
            target_tokens=sum(batch.target_counts),
            pairs=sum(prefix >= 0 for prefix in batch.prefixes) // 2,
            consumed={"benchmark": batch.num_tokens},
            segments=[(length, 0) for length in batch.lengths],
            samples=batch.num_segments,
            context=max(batch.lengths),
        )


def train(calls: Calls, objective: Objective, batch_of: Callable[[int], SegmentBatch]) -> None:
    """Lightning's loop as the stages use it, one call a step."""
    steps = 1 + len(
        next(calls.settings[name] for name in ("documents", "conversations", "pairs") if name in calls.settings)
    )
    rate = LearningRateConfig(schedule="constant", peak=calls.settings["learning_rate"])
    objective.optimised_by(OPTIMIZER, rate, total_tokens=10**9)
    fit(objective, AskedFor(calls, objective, batch_of, steps), ComputeConfig(), precision="fp32")  # pyright: ignore[reportArgumentType]


def generate(calls: Calls) -> None:
    calls.before_building()
    model = load(calls).eval()
    for index in calls:
        responses = sample(
            model,
            calls.settings["prompts"][index],
            samples=calls.settings["samples"],
            max_new_tokens=calls.settings["limits"][index],
            stop_ids=(),
            sampling=Sampling(1.0),
            seed=index,
            batch_size=calls.settings["places"],
        )
        calls.done(tokens=sum(len(response.ids) for response in responses))


def limit(calls: Calls) -> None:
    """float32 matrix products of the model's shapes, forward and for both gradients, into memory that is there."""
    shapes: Sequence[Sequence[int]] = calls.settings["products"]
    operands = []
    for rows, inputs, outputs in shapes:
        x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        operands += [(x, weight.T), (gradient, weight), (gradient.T, x)]
    results = [torch.empty(a.shape[0], b.shape[1]) for a, b in operands]
    for _ in calls:
        for (a, b), result in zip(operands, results, strict=True):
            torch.mm(a, b, out=result)
        calls.done(flops=sum(6 * rows * inputs * outputs for rows, inputs, outputs in shapes))


def vocabulary(calls: Calls) -> None:
    """Our log-likelihood, gradients made on the way as in pre-training, or (`in_backward`) as in DPO."""
    import vocabulary_inputs

    in_backward = calls.settings.get("in_backward")

    def loss(hidden: torch.Tensor, weight: nn.Parameter, targets: torch.Tensor) -> torch.Tensor:
        weights = None if in_backward else torch.ones(len(targets))
        return -token_log_likelihood(hidden, weight, targets, token_weights=weights).mean()

    vocabulary_inputs.measure(calls, loss)


if __name__ == "__main__":
    jobs = [pretrain, pretrain_with_lightning, sft, dpo, reward, generate, limit, vocabulary]
    serve({job.__name__: job for job in jobs}, ["lightning", "transformers"])
