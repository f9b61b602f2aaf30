"""The stage train on its own policy's responses: it learns, can be gone through again, and is one on two processes."""

import json
import shutil
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.experience import Experience
from lightning_llm.evaluation.config import ExactAnswerConfig, LengthConfig, SubstringConfig
from lightning_llm.objectives.config import DAPOConfig, DPOConfig, GRPOConfig, MDPOConfig, PPOConfig, RLOOConfig
from lightning_llm.optimization.config import AdamWConfig, LearningRateConfig
from lightning_llm.settings import UserError
from lightning_llm.stages import prepare, train
from lightning_llm.stages.config import ComputeConfig, PrepareSettings
from lightning_llm.training.config import RolloutConfig

STEPS = 40  # in which answers have become short
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, settings, prepared, tokenizer_artifact, context_of):
    """A model that has begun to answer what comes after a number, and prompts whose answer is known."""
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    rows = [{"prompt": f"{i}: after {WORDS[i % 10]}?", "answer": WORDS[(i + 1) % 10]} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig("asked", "questions", {"asked": SourceConfig(path=str(path))}, validation=0.1)
    asked = context_of(PrepareSettings(data, [], ["train", "validation"], seed=0), {"tokenizer": tokenizer_artifact})
    prepare.run(asked)
    sft = context_of(
        settings("conversations", context=[{"at": 0, "value": 64}], tokens=20_000, lr=LearningRateConfig(peak=1e-2)),
        {"tokenizer": tokenizer_artifact, "data": prepared["conversations"]},
    )
    train.run(sft)
    return {"data": asked.output, "tokenizer": tokenizer_artifact, "starts_from": sft.output}, data


@pytest.fixture
def live(settings, inputs):
    """`live(objective, in_all, **rollout)` -> settings of a live stage."""

    def make(objective, in_all=3, *, lr=3e-3, judge=None, **rollout):
        defaults = {"prompts": 16, "per_prompt": 4, "max_new_tokens": 8, "held_out": 20}
        return settings(
            objective=objective,
            data=inputs[1],
            optimizer=AdamWConfig(eps=1e-5),
            lr=LearningRateConfig("constant", peak=lr),
            tokens=100 * in_all,
            context=[{"at": 0, "value": 64}],
            batch_tokens=[{"at": 0, "value": 100}],
            rollout=RolloutConfig(**(defaults | rollout)),
            judge=judge or SubstringConfig(),
        )

    return make


def lines(context):
    return [json.loads(line) for line in (context.output / "metrics.jsonl").read_text().splitlines()]


def weights(context):
    return load_file(context.output / "model" / "model.safetensors")


@pytest.mark.parametrize("objective", [DPOConfig(), MDPOConfig()], ids=["dpo", "mdpo"])
def test_rewards_rise_and_the_curves_are_written_down(objective, live, inputs, context_of):
    settings = live(objective, STEPS, judge=LengthConfig(per_token=0.2))
    context = context_of(settings, inputs[0], evaluate_every=50.0 * STEPS)
    result = train.run(context)
    training = [line for line in lines(context) if "loss" in line]
    validation = [line for line in lines(context) if "validation/reward/mean" in line]
    first, last = (fmean(line["reward/mean"] for line in some) for some in (training[:5], training[-10:]))  # 64 a line
    assert last > first + 0.1
    assert [line["tokens"] for line in validation] == [0, 50 * STEPS, 100 * STEPS]
    assert validation[-1]["validation/reward/mean"] > validation[0]["validation/reward/mean"] + 0.1
    assert result.metrics["validation/reward/mean"] == validation[-1]["validation/reward/mean"]
    assert training[0]["kl/reference"] == pytest.approx(0.0, abs=1e-4)
    assert training[-1]["kl/reference"] > 0.1
    names = {"reward/ties", "responses/length", "responses/complete", "entropy", "logps/gap", "logps/gap_max"}
    assert names <= set(training[0])
    assert {line["staleness"] for line in training} == {0.0}
    assert max(line["logps/gap_max"] for line in training) < 1e-3
    if objective.name == "mdpo":  # the window was drawn by the weights that learn from it
        assert max(line["kl/iterate"] for line in training) < 1e-6
    assert len(list((context.output / "experience").iterdir())) == STEPS
    assert result.ledger["asked"] == training[-1]["consumed"]["asked"] > 0
    assert {"sample", "score", "judge"} <= set(result.seconds)


@pytest.mark.parametrize(
    "objective", [DPOConfig(), MDPOConfig(), RLOOConfig(), PPOConfig(), GRPOConfig(), DAPOConfig()],
    ids=lambda config: config.name,
)  # fmt: skip
def test_records_make_the_same_updates_to_the_bit(objective, live, inputs, context_of):
    """Gone through again with the records alone: nothing is drawn, everything is learnt."""
    kept = live(objective, 5, steps=2, epochs=2, prompts=6)
    first, again = (context_of(kept, inputs[0]) for _ in range(2))
    result = train.run(first)
    shutil.copytree(first.output / "experience", again.output / "experience")
    replayed = train.run(again)
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(again)[name]), name
    assert replayed.seconds.keys() >= {"sample"}  # the held-out prompts are still asked
    assert replayed.flops < result.flops
    for one, two in zip(lines(first), lines(again), strict=True):
        for line in (one, two):
            line.pop("tokens_per_second", None)
            line.pop("flops_utilisation", None)
        assert one == two
    training = [line for line in lines(first) if "loss" in line]
    ages = [line["staleness"] for line in training]  # of several steps, where those before had no pair to learn from
    assert max(ages) <= 3
    assert objective.name == "dpo" or ages == [0, 1, 2, 3, 0]
    assert [Experience.load(path).step for path in sorted((first.output / "experience").iterdir())] == [0, 4]


def test_an_average_as_reference_is_kept(live, inputs, context_of):
    context = context_of(live(MDPOConfig(), 3, reference="ema", ema_decay=0.5, prompts=4), inputs[0])
    train.run(context)
    average = load_file(context.output / "reference" / "model.safetensors")
    name = next(name for name in average if "q_proj" in name)
    before = load_file(inputs[0]["starts_from"] / "model" / "model.safetensors")[name]
    assert not torch.equal(average[name], before)
    assert not torch.equal(average[name], weights(context)[name])


@pytest.mark.distributed
@pytest.mark.parametrize("objective", [DPOConfig(), MDPOConfig()], ids=lambda config: config.name)
def test_two_processes_draw_shares_and_make_the_same_update(objective, live, inputs, context_of):
    kept = live(objective, 2, lr=1e-4, prompts=10)
    alone = context_of(kept, inputs[0])
    one = train.run(alone)
    both = context_of(kept, inputs[0], compute=ComputeConfig(devices=2, strategy="ddp", micro_batch_tokens=256))
    two = train.run(both)
    assert one.ledger == two.ledger
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weight, weights(both)[name], rtol=0, atol=1e-5)
    records = [Experience.load(context.output / "experience" / "000000") for context in (alone, both)]
    said = [[response.ids for group in record.groups for response in group.responses] for record in records]
    assert said[0] == said[1]
    for before, after in zip(lines(alone), lines(both), strict=True):
        for name in ("reward/mean", "responses/length", "validation/reward/mean", "samples"):
            if name in before:
                assert before[name] == pytest.approx(after[name], rel=1e-5)


def test_where_all_responses_tie_nothing_is_learnt(live, inputs, context_of):
    context = context_of(live(DPOConfig(), 2, judge=ExactAnswerConfig()), inputs[0])  # nobody says `answer: `
    with pytest.raises(UserError, match="no prompt has a response that is worth more than another"):
        train.run(context)
