"""What a step of a stage really does to the weights: all that `Objective.training_step` hands on, by plain descent.

AdamW would hide a factor of the gradient; with gradient descent a wrong divisor, bound or rate shows in the weights.
"""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch

from lightning_llm.optimization.config import AdamWConfig, LearningRateConfig
from lightning_llm.schedules import learning_rate
from lightning_llm.stages import train
from lightning_llm.stages.config import ComputeConfig
from lightning_llm.training.loop import fit


@dataclass
class Descent(AdamWConfig):
    """Weights less the rate times the gradient, and a note of each step's `schedule`."""

    def build(self, module):
        optimizer = torch.optim.SGD([{"params": list(module.parameters()), "lr_scale": 1.0}], lr=0.0)
        self.said = []
        optimizer.register_step_pre_hook(lambda *_: self.said.append(optimizer.param_groups[0]["schedule"]))
        return optimizer


@pytest.fixture
def trained(settings, prepared, tokenizer_artifact, context_of, monkeypatch):
    """`trained(form, clip_norm)` -> (objective after three steps, its copy from before, data, journal)."""

    def make(form, clip_norm=0.0, **named):
        inputs = {"data": prepared[form], "tokenizer": tokenizer_artifact}
        if form == "pairs":  # against itself, before its first step
            inputs["starts_from"] = named.pop("starts_from")
        asked = settings(
            form,
            lr=LearningRateConfig("linear", peak=0.2, final=0.02),
            context=[{"at": 0, "value": 64}],
            batch_tokens=[{"at": 0, "value": 500}],
            tokens=1500,
            **named,
        )
        context = context_of(asked, inputs, compute=ComputeConfig(micro_batch_tokens=200, flops_per_second=1e9))
        journal, objective, data, _ = train.prepare_training(context)
        objective.optimizer_config = Descent(clip_norm=clip_norm)
        before = copy.deepcopy(objective)
        fit(objective, data, context.compute, precision=asked.precision, callbacks=[journal])
        return objective, before, data, journal

    return make


def descend(objective, data, clip_norm):
    """The same three steps by hand, each window as one batch."""
    weights, norms = list(objective.model.parameters()), []
    for step in range(data.steps):
        window = data.window(step, micro_batch_tokens=10**6)
        (batch,) = window.mine
        mean = objective.loss(batch).loss / getattr(window, objective.unit)
        gradients = torch.autograd.grad(mean, weights)
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        factor = min(clip_norm / norms[-1], 1.0) if clip_norm else 1.0
        rate = learning_rate(objective.schedule, window.progress.tokens, objective.total_tokens)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= rate * factor * gradient
    return norms


@pytest.fixture(scope="module")
def base(settings, prepared, tokenizer_artifact, context_of):
    context = context_of(settings(tokens=3000), {"data": prepared["text"], "tokenizer": tokenizer_artifact})
    train.run(context)
    return context.output


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
@pytest.mark.parametrize("form", ["text", "pairs"])
def test_a_step_goes_down_the_gradient_of_the_mean_over_units(form, clip_norm, trained, base):
    objective, before, data, _ = trained(form, clip_norm, **({"starts_from": base} if form == "pairs" else {}))
    assert objective.unit == ("pairs" if form == "pairs" else "target_tokens")
    norms = descend(before, data, clip_norm)
    assert data.steps == len(norms) == 3
    assert min(norms) > 2 * clip_norm  # the bound is felt
    for ours, plain in zip(objective.model.parameters(), before.model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_the_optimizer_hears_the_rate_as_a_share_of_its_peak(trained):
    objective, _, data, _ = trained("text")
    rates = [learning_rate(objective.schedule, data.progress(step + 1).tokens, 1500) for step in range(3)]
    assert objective.optimizer_config.said == pytest.approx([rate / 0.2 for rate in rates])
    assert len(set(rates)) == 3


def test_rate_and_utilisation_are_of_training_alone(trained, monkeypatch):
    """By a clock that says one second more whenever it is asked, and a hundred more after a validation."""
    seconds = itertools.count(step=1.0)
    extra = [0.0]
    monkeypatch.setattr("lightning_llm.training.journal.time.perf_counter", lambda: next(seconds) + extra[0])
    validate = train.Journal._validate

    def slow(self, *words, **named):
        extra[0] += 100.0
        return validate(self, *words, **named)

    monkeypatch.setattr(train.Journal, "_validate", slow)
    _, _, data, journal = trained("text")
    assert journal.validation_seconds > 200
    assert journal.seconds < 20
    consumed = sum(sum(data.window(step, micro_batch_tokens=200).consumed.values()) for step in range(data.steps))
    assert journal.tokens == consumed
    flops = sum(journal.training_flops(data.window(step, micro_batch_tokens=200).segments) for step in range(3))
    assert journal.flops == pytest.approx(flops)
    last = data.window(2, micro_batch_tokens=200)
    interval = journal.training_flops(last.segments)  # a line for every step
    rate = journal.last["tokens_per_second"]
    assert journal.last["flops_utilisation"] / rate == pytest.approx(
        interval / sum(last.consumed.values()) / journal.flops_per_second
    )
    assert rate == pytest.approx(sum(last.consumed.values()), rel=0.6)  # a second or two of that clock


def test_validation_has_the_precision_of_the_stage(settings, prepared, tokenizer_artifact, context_of, base):
    inputs = {"data": prepared["text"], "tokenizer": tokenizer_artifact, "starts_from": base}
    losses = {}
    for precision in ("fp32", "bf16"):
        context = context_of(settings(precision=precision, tokens=600), inputs)
        journal, objective, data, _ = train.prepare_training(context)
        fit(objective, data, context.compute, precision=precision, callbacks=[journal])
        losses[precision] = (context.output / "metrics.jsonl").read_text().splitlines()[0]  # before the first step
    assert losses["fp32"] != losses["bf16"]
