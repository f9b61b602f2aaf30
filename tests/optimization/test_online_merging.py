"""Online merging around every optimizer: algorithms 1 and 2 written out, decay apart, the same on every rank."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_llm.merging.online import ondare, onties, seeded
from lightning_llm.optimization.config import (
    AdamWConfig,
    AFMRMSPropConfig,
    LionConfig,
    MuonConfig,
    OnlineMergingConfig,
)
from lightning_llm.optimization.online_merging import OnlineMerging

KINDS = [AdamWConfig, LionConfig, AFMRMSPropConfig, MuonConfig]
LR, SCHEDULE, STEPS = 0.03, 0.6, 7


class Parameters(nn.Module):
    """A matrix and a vector, small next to the steps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 4)])
        chance = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=chance)


def draws(module, count, seed=1):
    chance = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=chance) for p in module.parameters()] for _ in range(count)]


def taus_of(module):
    [values] = draws(module, 1, seed=2)
    return dict(zip(dict(module.named_parameters()), values, strict=True))


def take(module, optimizer, gradients):
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    for group in optimizer.param_groups:
        group["lr"], group["schedule"] = LR * group["lr_scale"], SCHEDULE
    optimizer.step()


def proposed(kind, module, gradients):
    """Each step that the optimizer alone makes from these gradients; no decay, so weights play no part."""
    config = kind(weight_decay=0.0)
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data.zero_()
    optimizer, steps = config.build(module), []
    for each in gradients:
        take(module, optimizer, each)
        steps.append([parameter.detach().double() for parameter in module.parameters()])
        for parameter in module.parameters():
            parameter.data.zero_()
    return steps


def plain_merge(merging, delta, tau, seed, step, name):
    rates = {"alpha": merging.alpha, "reserve_rate": merging.reserve_rate}
    if merging.method == "onties":
        return onties(delta, tau, **rates)
    generator = seeded(seed, "online merging", step, name)
    return ondare(delta.float(), tau.float(), **rates, generator=generator, rescale=merging.rescale).double()


def algorithm(config, module, gradients, taus, seed):
    """Algorithm 2 in float64; with a gap of 1 it is algorithm 1."""
    merging, steps, names = config.online_merging, proposed(type(config), module, gradients), list(taus)
    weights = [parameter.detach().double() for parameter in module.parameters()]
    for i, name in enumerate(names):
        cached = torch.zeros_like(weights[i])
        decay = config.weight_decay if weights[i].ndim > 1 else 0.0
        decay *= LR if type(config) is not AFMRMSPropConfig else SCHEDULE
        for t in range(1, len(steps) + 1):
            delta = steps[t - 1][i]
            theta = weights[i] - decay * weights[i]
            if t % merging.gap_steps:
                cached = cached + delta
                weights[i] = theta + delta
            else:
                theta, delta, cached = theta - cached, delta + cached, torch.zeros_like(theta)
                weights[i] = theta + plain_merge(merging, delta, taus[name].double(), seed, t, name)
    return weights


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize(
    ("method", "rescale", "rate"), [("ondare", False, 0.5), ("ondare", True, 0.3), ("onties", False, 0.4)]
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_steps_are_the_algorithm(kind, method, rescale, rate, gap):
    merging = OnlineMergingConfig(method=method, alpha=0.01, reserve_rate=rate, gap_steps=gap, rescale=rescale)
    config, module = kind(online_merging=merging, weight_decay=0.1), Parameters()
    gradients, taus = draws(module, STEPS), taus_of(module)
    expected = algorithm(config, module, gradients, taus, seed=5)
    optimizer = OnlineMerging(config, taus, seed=5).around(config.build(module), module)
    for each in gradients:
        take(module, optimizer, each)
    for parameter, values in zip(module.parameters(), expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), values.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_with_nothing_dropped_and_no_weight_it_is_the_optimizer(kind):
    for gap in (1, 4):
        merging = OnlineMergingConfig(method="ondare", alpha=0.0, reserve_rate=1.0, gap_steps=gap)
        config, module = kind(online_merging=merging), Parameters()
        gradients, alone = draws(module, STEPS), copy.deepcopy(module)
        plain = config.build(alone)
        merged = OnlineMerging(config, taus_of(module), seed=0).around(config.build(module), module)
        for each in gradients:
            take(alone, plain, each)
            take(module, merged, each)
        for one, other in zip(module.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_small_step_is_not_rounded_by_large_weights():
    """The largest steps are picked by what they are, not by what is left of them in fp32 weights."""
    merging = OnlineMergingConfig(method="onties", alpha=0.0, reserve_rate=0.5)
    config, module = AdamWConfig(online_merging=merging, weight_decay=0.0), nn.Linear(4, 1, bias=False)
    nn.init.constant_(module.weight, 1000.0)
    optimizer = OnlineMerging(config, {"weight": torch.zeros(1, 4)}, 0).around(config.build(module), module)
    seen = []
    own = OnlineMerging._merged

    def spy(self, name, delta, step):
        seen.append(delta.clone())
        return own(self, name, delta, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineMerging, "_merged", spy)
        module.weight.grad = torch.tensor([[1.0, 1e-9, 1.0, 1e-9]])
        for group in optimizer.param_groups:
            group["lr"] = 1e-6
        optimizer.step()
    torch.testing.assert_close(seen[0], -1e-6 * torch.tensor([[1.0, 1 / 11, 1.0, 1 / 11]]), rtol=1e-4, atol=0)


def test_a_copy_from_its_state_goes_on_as_the_original():
    merging = OnlineMergingConfig(method="ondare", alpha=0.1, reserve_rate=0.5, gap_steps=3)
    config, module = AdamWConfig(online_merging=merging), Parameters()
    gradients, taus = draws(module, 8), taus_of(module)
    optimizer = OnlineMerging(config, taus, 0).around(config.build(module), module)
    for each in gradients[:4]:
        take(module, optimizer, each)
    other = copy.deepcopy(module)
    resumed = OnlineMerging(config, taus, 0).around(config.build(other), other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in gradients[4:]:
        take(module, optimizer, each)
        take(other, resumed, each)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_parameter_without_a_gradient_stays():
    merging = OnlineMergingConfig(method="ondare", alpha=0.5, reserve_rate=1.0)
    config, module = AdamWConfig(online_merging=merging), Parameters()
    before = module.layers[1].weight.detach().clone()
    optimizer = OnlineMerging(config, taus_of(module), 0).around(config.build(module), module)
    for group in optimizer.param_groups:
        group["lr"] = LR
    module.layers[0].weight.grad = torch.ones_like(module.layers[0].weight)
    optimizer.step()
    assert torch.equal(module.layers[1].weight, before)


def test_a_task_vector_of_another_model_is_refused():
    module = Parameters()
    config = AdamWConfig(online_merging=OnlineMergingConfig(method="ondare"))
    merging = OnlineMerging(config, {n: tau for n, tau in taus_of(module).items() if n != "layers.1.bias"}, 0)
    with pytest.raises(ValueError, match=r"layers.1.bias has shape \[4\], and base and reference have none"):
        merging.around(config.build(module), module)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"method": "dare"}, "method must be one of none, ondare, onties"),
        ({"alpha": 2.0}, "alpha must lie"),
        ({"reserve_rate": 0.0}, "reserve_rate must lie"),
        ({"gap_steps": 0}, "gap_steps must be"),
        ({"method": "onties", "rescale": True}, "rescale is for ondare"),
    ],
)
def test_settings_that_are_none(values, says):
    with pytest.raises(ValueError, match=says):
        OnlineMergingConfig(**values)
