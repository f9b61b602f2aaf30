"""The stage merge: every method by its plain formula on directories, what is copied, what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_llm.data.tokenizer import Tokenizer, train_tokenizer
from lightning_llm.merging.averaging import liti
from lightning_llm.merging.config import (
    DareConfig,
    LinearConfig,
    LitiConfig,
    SlerpConfig,
    TaskArithmeticConfig,
    TiesConfig,
    WarmConfig,
)
from lightning_llm.merging.spherical import slerp_task_vectors
from lightning_llm.merging.task_vectors import dare, task_arithmetic, ties
from lightning_llm.models import Transformer
from lightning_llm.models.families import CLASSIFIER, read_head
from lightning_llm.models.reward import GRADING_FILE, RewardModel
from lightning_llm.settings import UserError
from lightning_llm.stages import merge
from lightning_llm.stages.config import MergeSettings


@pytest.fixture(scope="module")
def moved(talker, tmp_path_factory):
    """`moved(seed)` -> a directory of the talker with other weights; the tokenizer's files beside them."""

    def make(seed, kind=Transformer):
        folder = tmp_path_factory.mktemp("moved")
        model = Transformer.from_pretrained(talker)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
        if kind is RewardModel:
            model = RewardModel.from_backbone(model, seed=0, graded=["truthfulness"])
            with torch.no_grad():
                model.score.weight.add_(seed)
                model.grading["truthfulness"][0].weight.add_(seed)
        model.save_pretrained(folder, eos_token_ids=[3])
        Tokenizer.load(talker).save(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def models(moved):
    return [moved(seed) for seed in (1, 2)]


def weights(folder):
    return load_file(folder / "model.safetensors")


def merged(context_of, method, models, start=None, seed=0):
    inputs = {f"model.{number}": folder for number, folder in enumerate(models)}
    context = context_of(MergeSettings(method, seed), inputs | ({} if start is None else {"starts_from": start}))
    return context.output / "model", merge.run(context)


METHODS = {  # setting, what the pure function says
    "slerp": (SlerpConfig(t=0.3), lambda start, states: slerp_task_vectors(start, states, 0.3)),
    "task_arithmetic": (TaskArithmeticConfig(scale=0.7), lambda start, states: task_arithmetic(start, states, 0.7)),
    "ties": (TiesConfig(density=0.3, scale=0.9), lambda start, states: ties(start, states, 0.3, 0.9)),
    "dare": (DareConfig(density=0.3), lambda start, states: dare(start, states, 0.3, 0.5, 7)),
}


@pytest.mark.parametrize(("method", "expected"), METHODS.values(), ids=METHODS.keys())
def test_directories_become_what_states_become(method, expected, models, talker, context_of):
    folder, result = merged(context_of, method, models, talker, seed=7)
    plain = expected(weights(talker), [weights(model) for model in models])
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-7)
    assert result.metrics["task_vectors/angle"] == pytest.approx(90, abs=3)  # they moved by independent noise


def test_liti_is_on_the_way(models, talker, context_of):
    folder, _ = merged(context_of, LitiConfig(eta=0.25), models[:1], talker)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, 0.75 * weights(talker)[name] + 0.25 * weights(models[0])[name])


def test_the_mean_has_all_that_a_model_needs(models, context_of):
    folder, result = merged(context_of, LinearConfig(weights=[0.8, 0.2]), models)
    first, second = (weights(model) for model in models)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, 0.8 * first[name] + 0.2 * second[name])
    assert {path.name for path in folder.iterdir()} == {path.name for path in models[0].iterdir()}
    assert json.loads((folder / "config.json").read_text()) == json.loads((models[0] / "config.json").read_text())
    assert Tokenizer.load(folder).fingerprint == Tokenizer.load(models[0]).fingerprint
    Transformer.from_pretrained(folder)
    assert result.metrics == {"tensors": len(first)}


def test_reward_models_are_averaged_with_their_heads(moved, context_of):
    members = [moved(seed, RewardModel) for seed in (1, 2, 3)]
    folder, _ = merged(context_of, WarmConfig(), members)
    assert read_head(folder) == CLASSIFIER
    model, parts = RewardModel.from_pretrained(folder), [RewardModel.from_pretrained(member) for member in members]
    for name, parameter in model.named_parameters():
        mean = np.mean([dict(part.named_parameters())[name].detach().double().numpy() for part in parts], axis=0)
        np.testing.assert_allclose(parameter.detach().numpy(), mean, rtol=1e-5, atol=1e-6, err_msg=name)
    assert (folder / GRADING_FILE).is_file()


def test_warps_step_is_two_merges(models, talker, context_of):
    """Task vectors on the arc, then part of the way from where they began (algorithm 1, lines 9 and 11)."""
    arc, _ = merged(context_of, SlerpConfig(), models, talker)
    step, _ = merged(context_of, LitiConfig(eta=0.3), [arc], talker)
    start, states = weights(talker), [weights(model) for model in models]
    expected = liti(start, slerp_task_vectors(start, states), 0.3)
    for name, tensor in weights(step).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_what_does_not_belong_together_is_refused(models, moved, talker, tmp_path, context_of):
    config = dataclasses.replace(Transformer.from_pretrained(talker).config, rms_norm_eps=1e-3)
    other = Transformer(config)
    other.reset_parameters(0)
    other.save_pretrained(tmp_path / "eps")
    with pytest.raises(UserError, match=r"eps: rms_norm_eps is 0.001, in \S+ 1e-06"):
        merged(context_of, LinearConfig(), [models[0], tmp_path / "eps"])
    reward = moved(5, RewardModel)
    with pytest.raises(UserError, match=r"is ForSequenceClassification, .* is ForCausalLM"):
        merged(context_of, LinearConfig(), [models[0], reward])
    with pytest.raises(UserError, match="speaks, and warm is for reward models"):
        merged(context_of, WarmConfig(), models)
    tokenizer = train_tokenizer(["other words altogether, so many of them: one two three"] * 20, 280)
    strange = moved(6)
    tokenizer.save(strange)
    with pytest.raises(UserError, match="has another tokenizer"):
        merged(context_of, LinearConfig(), [models[0], strange])
    damaged = moved(7)
    kept = weights(damaged)
    del kept["model.norm.weight"]
    save_file(kept, damaged / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight: is missing, \S+ has it"):
        merged(context_of, LinearConfig(), [models[0], damaged])


@pytest.mark.parametrize(
    "method", [LinearConfig(), TiesConfig(), DareConfig(density=0.5)], ids=lambda method: method.name
)
def test_a_diverged_model_is_refused_by_name(method, models, moved, talker, context_of):
    sick = moved(7)
    state = load_file(sick / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan
    save_file(state, sick / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{sick}: model\.layers\.1\.mlp\.up_proj\.weight: holds numbers that are not"):
        merged(context_of, method, [models[0], sick], talker if method.needs_start else None)


def test_large_numbers_are_no_fault():
    assert merge.is_finite(torch.full((4,), 3e38))  # whose sum is none
    assert not merge.is_finite(torch.tensor([1.0, torch.inf]))
    assert not merge.is_finite(torch.tensor([-torch.inf, torch.inf]).half())
