"""A stage whose model is a mean of its weights: the mean itself in float64, what is kept beside it, what it costs."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from lightning_llm import compose, plan
from lightning_llm.models import Transformer
from lightning_llm.settings import UserError
from lightning_llm.stages import train
from lightning_llm.stages.config import ComputeConfig
from lightning_llm.training.config import AveragingConfig
from lightning_llm.training.loop import fit


class Spy(Callback):
    """Every step's weights in float64, and the tokens up to it."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = {name: p.detach().double().clone() for name, p in pl_module.model.named_parameters()}
        self.seen.append((batch.progress.steps, batch.progress.tokens, weights))


@pytest.fixture(scope="module")
def inputs(prepared, tokenizer_artifact):
    return {"data": prepared["text"], "tokenizer": tokenizer_artifact}


@pytest.fixture(scope="module")
def watched(settings, inputs, context_of):
    """The weights of every step of a stage that averages nothing, and its context."""
    context = context_of(settings(), inputs)
    journal, objective, data, _ = train.prepare_training(context)
    spy = Spy()
    fit(objective, data, context.compute, precision="fp32", callbacks=[journal, spy])
    return spy.seen


def polyak(checkpoints):
    return {name: sum(weights[name] for weights in checkpoints) / len(checkpoints) for name in checkpoints[0]}


def exponential(checkpoints, decay):
    """The first checkpoint's weight is decay^(n-1), that of the k-th after it (1 - decay) decay^(n-1-k)."""
    n = len(checkpoints)
    weights = [decay ** (n - 1), *((1 - decay) * decay ** (n - 1 - k) for k in range(1, n))]
    assert sum(weights) == pytest.approx(1)
    return {name: sum(w * c[name] for w, c in zip(weights, checkpoints, strict=True)) for name in checkpoints[0]}


CASES = {  # settings -> which of the 25 steps count
    "all": (AveragingConfig("polyak"), range(1, 26)),
    "every fourth of the second half": (AveragingConfig("polyak", from_share=0.5, every=4), [17, 21, 25]),
    "ema": (AveragingConfig("ema", from_share=0.2, every=3, decay=0.8), [10, 13, 16, 19, 22, 25]),
    "the last alone": (AveragingConfig("ema", every=100), [25]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_model_is_the_mean_and_the_last_weights_are_beside_it(case, settings, inputs, context_of, watched):
    config, counted = case
    context = context_of(settings(averaging=config), inputs)
    result = train.run(context)
    steps = [step for step, tokens, _ in watched if tokens > config.from_share * 12_000]
    assert set(counted) <= set(steps)
    checkpoints = [weights for step, _, weights in watched if step in counted]
    assert result.metrics["averaged/checkpoints"] == len(checkpoints) == len(list(counted))
    expected = polyak(checkpoints) if config.method == "polyak" else exponential(checkpoints, config.decay)
    model, last = (
        dict(Transformer.from_pretrained(context.output / folder).named_parameters()) for folder in ("model", "last")
    )
    for name, weights in expected.items():
        torch.testing.assert_close(model[name].detach().double(), weights, rtol=1e-5, atol=1e-6)
        assert torch.equal(last[name].double(), watched[-1][2][name]), name
    assert (context.output / "last" / "tokenizer.json").is_file()


def test_held_out_rows_are_measured_for_both(settings, inputs, context_of):
    context = context_of(settings(averaging=AveragingConfig("polyak", every=5)), inputs)
    found = train.run(context).metrics
    plain = train.run(context_of(settings(), inputs)).metrics
    assert found["validation/loss"] == plain["validation/loss"]  # of the last weights, as without the average
    assert found["averaged/loss"] != found["validation/loss"]
    # as a stage that starts from the average finds them before its first step
    other = context_of(settings(), inputs | {"starts_from": context.output})
    train.run(other)
    before = json.loads((other.output / "metrics.jsonl").read_text().splitlines()[0])
    assert found["averaged/loss"] == pytest.approx(before["validation/loss"], rel=1e-6)


@pytest.mark.distributed
def test_two_processes_average_the_same(settings, inputs, context_of):
    averaging = settings(tokens=3000, averaging=AveragingConfig("polyak"))
    compute = ComputeConfig(devices=2, strategy="ddp", micro_batch_tokens=256)
    alone, both = context_of(averaging, inputs), context_of(averaging, inputs, compute=compute)
    results = [train.run(context) for context in (alone, both)]
    assert results[0].metrics["averaged/loss"] == pytest.approx(results[1].metrics["averaged/loss"], rel=1e-4)
    for folder in ("model", "last"):
        one, two = (load_file(context.output / folder / "model.safetensors") for context in (alone, both))
        for name, weight in one.items():
            torch.testing.assert_close(weight, two[name], rtol=0, atol=1e-5)


def test_a_recipe_says_so_and_its_plan_knows_what_it_costs():
    def nodes_of(*words):
        return {node.name: node for node in plan(compose("qwen2", overrides=words)).nodes}

    plain, averaged = nodes_of(), nodes_of("stages.pretrain.averaging.method=polyak")
    assert plain["pretrain"].settings.averaging is None
    assert averaged["pretrain"].settings.averaging == AveragingConfig("polyak")
    assert averaged["sft"].settings.averaging is None
    size = 4 * plain["pretrain"].figures["parameters"] / 2**30
    for figure in ("memory_gib", "disk_gib"):
        more = averaged["pretrain"].figures[figure] - plain["pretrain"].figures[figure]
        assert more == pytest.approx(size), figure


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("method=polyack", "method: is one of none, polyak, ema, is 'polyack'"),
        ("from_share=1", "from_share: lies in"),
        ("every=0", "every: must be a number of at least 1"),
        ("decay=1", "decay: lies in"),
    ],
)
def test_a_mistake_is_one_line(word, says):
    with pytest.raises(UserError, match=says):
        compose("qwen2", overrides=[f"stages.pretrain.averaging.{word}"])
