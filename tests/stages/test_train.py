"""The stage train: it learns, leaves what the next stage needs, and does the same on one process and on two."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.models import Transformer
from lightning_llm.models.compilation import refuse_absent_compiler
from lightning_llm.objectives.config import CausalLMConfig, PruningMasksConfig, RewardModelConfig
from lightning_llm.optimization.config import LearningRateConfig
from lightning_llm.settings import UserError
from lightning_llm.stages import prepare, score, train
from lightning_llm.stages.config import ComputeConfig, PrepareSettings, ScoreSettings
from lightning_llm.stages.context import model_directory


@pytest.fixture(scope="session")
def pretrained(settings, prepared, tokenizer_artifact, context_of):
    """Context and result of a pre-training."""
    inputs = {"data": prepared["text"], "tokenizer": tokenizer_artifact}
    context = context_of(settings(), inputs, evaluate_every=5000.0)
    return context, train.run(context)


def lines(context):
    return [json.loads(line) for line in (context.output / "metrics.jsonl").read_text().splitlines()]


def weights(context):
    return load_file(context.output / "model" / "model.safetensors")


def test_attention_that_cannot_learn_here_is_refused_before_the_first_step(
    settings, prepared, tokenizer_artifact, context_of
):
    inputs = {"data": prepared["text"], "tokenizer": tokenizer_artifact}
    compute = ComputeConfig(micro_batch_tokens=256, attention="flex")
    with pytest.raises(UserError, match=r"compute\.attention: flex has no gradients on a CPU\. Set compute"):
        train.run(context_of(settings(), inputs, compute=compute))


def test_it_learns_and_says_so(pretrained):
    context, result = pretrained
    written = lines(context)
    training = [line for line in written if "loss" in line]
    validation = [line for line in written if "validation/loss" in line]
    assert training[-1]["loss"] < 0.5 * training[0]["loss"]
    assert [line["tokens"] for line in validation] == [0, 5400, 10_200, 12_000]
    assert validation[0]["validation/loss"] == pytest.approx(torch.log(torch.tensor(320.0)).item(), rel=0.02)
    assert validation[-1]["validation/prose"] < 0.5 * validation[0]["validation/prose"]
    assert [line["step"] for line in training] == list(range(1, 26))  # fewer than 200: a line each
    assert training[-1]["tokens"] == 12_000
    assert training[-1]["lr"] == pytest.approx(1e-3)
    assert {line["context"] for line in training} == {32, 64}
    assert training[-1]["consumed"] == result.ledger
    assert result.ledger["prose"] == pytest.approx(8400, abs=64)
    for name in ("grad_norm", "tokens_per_second", "flops_utilisation", "samples"):
        assert all(line[name] > 0 for line in training), name
    assert result.metrics["loss"] == training[-1]["loss"]
    assert result.metrics["validation/loss"] == validation[-1]["validation/loss"]
    assert result.metrics["steps"] == 25
    assert result.flops > 0


def test_it_leaves_a_model_with_its_tokenizer(pretrained, tokenizer_artifact):
    context, _ = pretrained
    directory = model_directory(context.output)
    model, tokenizer = Transformer.from_pretrained(directory), Tokenizer.load(directory)
    assert tokenizer.fingerprint == Tokenizer.load(tokenizer_artifact / "tokenizer").fingerprint
    assert model.config.max_position_embeddings == 64
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [tokenizer.eos_id]


def test_the_same_settings_give_the_same_weights_for_any_micro_batch(pretrained, settings, context_of):
    context, _ = pretrained
    again = context_of(settings(), context.inputs)
    train.run(again)
    small = context_of(settings(), context.inputs, compute=ComputeConfig(micro_batch_tokens=70))
    train.run(small)
    for name, weight in weights(context).items():
        assert torch.equal(weight, weights(again)[name]), name
        torch.testing.assert_close(weight, weights(small)[name], rtol=0, atol=1e-4)  # rounding, after 25 steps


def test_checkpointing_gives_the_same_weights_to_the_bit(pretrained, settings, context_of):
    compute = ComputeConfig(micro_batch_tokens=256, activation_checkpointing="full")
    again = context_of(settings(), pretrained[0].inputs, compute=compute)
    train.run(again)
    for name, weight in weights(pretrained[0]).items():
        assert torch.equal(weight, weights(again)[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's tracer's own
def test_a_stage_of_compiled_parts_learns_the_same(settings, prepared, tokenizer_artifact, context_of):
    try:
        refuse_absent_compiler("cpu")
    except UserError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    counters.clear()
    losses = []
    for compile in (False, True):
        assert not counters["stats"]["unique_graphs"]
        compute = ComputeConfig(micro_batch_tokens=256, compile=compile)
        inputs = {"data": prepared["text"], "tokenizer": tokenizer_artifact}
        losses.append(train.run(context_of(settings(tokens=3000), inputs, compute=compute)).metrics["validation/loss"])
    torch._dynamo.reset()
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    # a feed-forward and a norm, with a backward pass and without, for every shape of batch in training and validation
    assert counters["stats"]["unique_graphs"] == 4


def test_products_in_bf16_leave_weights_in_fp32(pretrained, settings, context_of):
    context = context_of(settings(precision="bf16"), pretrained[0].inputs)
    result = train.run(context)
    assert result.metrics["loss"] == pytest.approx(pretrained[1].metrics["loss"], rel=0.2)
    assert result.metrics["loss"] != pretrained[1].metrics["loss"]
    assert {weight.dtype for weight in weights(context).values()} == {torch.float32}


def test_sft_and_dpo_follow(pretrained, settings, prepared, tokenizer_artifact, context_of):
    inputs = {"tokenizer": tokenizer_artifact, "starts_from": pretrained[0].output}
    stretch = {"rope_type": "linear", "factor": 2.0}
    stretched = settings("conversations", rope_theta=1e6, rope_scaling=stretch)
    sft = context_of(stretched, inputs | {"data": prepared["conversations"]})
    train.run(sft)
    config = Transformer.from_pretrained(sft.output / "model").config
    assert config.rope_parameters == {"rope_theta": 1e6} | stretch
    tokenizer = Tokenizer.load(sft.output / "model")
    stops = json.loads((sft.output / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [tokenizer.end_of_turn_id, tokenizer.eos_id]

    scored = {"model": sft.output, "data": prepared["pairs"]}
    reference = context_of(ScoreSettings(64, ["train", "validation"], "fp32"), scored)
    score.run(reference)
    inputs |= {"data": prepared["pairs"], "starts_from": sft.output}
    pairs = settings(
        "pairs", lr=LearningRateConfig("constant", peak=1e-3), context=[{"at": 0, "value": 64}], tokens=6000
    )
    column = context_of(pairs, inputs | {"reference": reference.output})
    online = context_of(pairs, inputs)
    for context in (column, online):
        train.run(context)
        training = [line for line in lines(context) if "loss" in line]
        assert training[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-3)
        assert training[-1]["rewards/accuracies"] > 0.9
        assert training[-1]["rewards/margins"] > 0.1
        assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= set(training[0])
        assert "validation/rewards/accuracies" in lines(context)[-1]
    for name, weight in weights(column).items():
        torch.testing.assert_close(weight, weights(online)[name], rtol=0, atol=1e-5)


def one_step(settings, form, **named):
    return settings(
        form,
        lr=LearningRateConfig("constant", peak=1e-3),
        context=[{"at": 0, "value": 64}],
        batch_tokens=[{"at": 0, "value": 1500}],
        tokens=1500,
        **named,
    )


@pytest.mark.distributed
@pytest.mark.parametrize(("form", "keep"), [("text", "full"), ("pairs", "none")])
def test_two_processes_make_the_same_update_as_one(
    form, keep, settings, prepared, tokenizer_artifact, pretrained, context_of
):
    inputs = {"data": prepared[form], "tokenizer": tokenizer_artifact, "starts_from": pretrained[0].output}
    alone = context_of(one_step(settings, form), inputs)
    alone_result = train.run(alone)
    compute = ComputeConfig(devices=2, strategy="ddp", micro_batch_tokens=256, activation_checkpointing=keep)
    both = context_of(one_step(settings, form), inputs, compute=compute)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    both_result = train.run(both)
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weight, weights(both)[name], rtol=0, atol=1e-6)
    assert both_result.ledger == alone_result.ledger
    for one, two in zip(lines(alone), lines(both), strict=True):
        assert one.pop("consumed", None) == two.pop("consumed", None)
        for line in (one, two):
            line.pop("tokens_per_second", None)
            line.pop("flops_utilisation", None)
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert not {"RANK", "WORLD_SIZE"} & set(os.environ)


@pytest.mark.distributed
def test_a_failing_rank_is_named(settings, prepared, tokenizer_artifact, context_of):
    broken = one_step(settings, "text", objective=CausalLMConfig())
    broken.lr.warmup_steps = 3.0  # a bug of the plan's: it turns steps into tokens
    compute = ComputeConfig(devices=2, strategy="ddp")
    context = context_of(broken, {"data": prepared["text"], "tokenizer": tokenizer_artifact}, compute=compute)
    with pytest.raises(RuntimeError, match=r"rank \d of 2 failed.*warmup_steps"):
        train.run(context)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.distributed)], ids=["one", "two"])
def test_a_signal_ends_the_stage_as_an_interrupt(devices, number, settings, prepared, tokenizer_artifact, context_of):
    long = settings(tokens=2_000_000, data=dataclasses.replace(settings().data, max_epochs=1e9))
    compute = ComputeConfig(devices=devices, strategy="single" if devices == 1 else "ddp")
    inputs = {"data": prepared["text"], "tokenizer": tokenizer_artifact}
    context = context_of(long, inputs, compute=compute, evaluate_every=1e5)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def kill_once_it_trains():
        while not (context.output / "metrics.jsonl").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=kill_once_it_trains)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train.run(context)
    thread.join()
    assert not (context.output / "model").exists()
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_steps_smaller_than_a_document_and_no_more_than_200_lines(settings, prepared, tokenizer_artifact, context_of):
    small = settings(batch_tokens=[{"at": 0, "value": 20}], tokens=6000)
    context = context_of(small, {"data": prepared["text"], "tokenizer": tokenizer_artifact}, evaluate_every=1e9)
    result = train.run(context)
    assert result.metrics["steps"] == 300
    training = [line for line in lines(context) if "loss" in line]
    assert 140 <= len(training) <= 150  # every other step, and an interval in which nothing counts goes on
    assert len(lines(context)) == len(training) + 2


def test_nothing_to_learn_is_refused(settings, prepared, tokenizer_artifact, context_of, tmp_path):
    shutil.copytree(prepared["conversations"], tmp_path, dirs_exist_ok=True)
    masks = tmp_path / "sources" / "talks" / "train" / "targets.bin"
    masks.write_bytes(bytes(masks.stat().st_size))
    np.save(masks.parent / "counts.npy", np.zeros(TokenStore.open(masks.parent).rows, np.int64))
    context = context_of(settings("conversations", tokens=1000), {"data": tmp_path, "tokenizer": tokenizer_artifact})
    with pytest.raises(UserError, match="nothing in its data is to be learnt"):
        train.run(context)


def test_a_loss_that_is_no_number_stops_the_stage(settings, prepared, tokenizer_artifact, context_of):
    wild = settings(lr=LearningRateConfig("constant", peak=float("inf")))
    context = context_of(wild, {"data": prepared["text"], "tokenizer": tokenizer_artifact})
    with pytest.raises(FloatingPointError, match="loss became nan"):
        train.run(context)


@pytest.mark.parametrize(
    "objective",
    [CausalLMConfig(), PruningMasksConfig(intermediate_size=32), RewardModelConfig()],
    ids=lambda objective: objective.name,
)
def test_siblings_begin_as_one_model_and_read_in_another_order(
    objective, settings, prepared, tokenizer_artifact, context_of
):
    """Random weights, scores of masks and heads are drawn by one seed, the order of rows by another."""
    named, inputs = {"objective": objective}, {"data": prepared["text"], "tokenizer": tokenizer_artifact}
    if objective.is_scored:
        source = SourceConfig(path="embedded:comparisons", options={"rows": 200, "held_out": 20})
        named["data"] = DataConfig("comparisons", "rankings", {"comparisons": source}, max_epochs=50)
        named |= {"context": [{"at": 0, "value": 128}], "batch_tokens": [{"at": 0, "value": 600}]}
        rows = context_of(PrepareSettings(named["data"], [128], ["train", "validation"], seed=0), inputs)
        prepare.run(rows)
        inputs["data"] = rows.output

    def begun(seed, seed_of_parameters):
        asked = settings(seed=seed, seed_of_parameters=seed_of_parameters, **named)
        _, built, data, _ = train.prepare_training(context_of(asked, inputs))
        (batch,) = data.window(0, micro_batch_tokens=2**20).mine
        return built.model.state_dict(), batch.input_ids

    (one, rows), (sibling, others), (stranger, _) = begun(3, None), begun(4, 3), begun(4, None)
    assert one.keys() == sibling.keys()
    assert all(torch.equal(sibling[name], tensor) for name, tensor in one.items())
    assert not torch.equal(rows, others)
    assert not all(torch.equal(stranger[name], tensor) for name, tensor in one.items())


def test_what_does_not_belong_together_is_refused(
    settings, prepared, tokenizer_artifact, pretrained, context_of, tmp_path
):
    inputs = {"data": prepared["text"], "tokenizer": tokenizer_artifact, "starts_from": pretrained[0].output}
    (tmp_path / "tokenizer_fingerprint").write_text("0123456789abcdef")
    with pytest.raises(UserError, match=r"tokenizer of the data \(sha 01234567\) is not that of the stage"):
        train.run(context_of(settings(), inputs | {"data": tmp_path}))
    with pytest.raises(UserError, match="holds no model"):
        train.run(context_of(settings(), inputs | {"starts_from": tmp_path}))
