"""Every optimizer against its formula in float64, and which parameters are in which group."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.size import parameter_counts
from lightning_llm.objectives.causal_lm import CausalLM
from lightning_llm.objectives.config import CausalLMConfig
from lightning_llm.optimization.config import (
    AdamWConfig,
    AFMRMSPropConfig,
    LionConfig,
    MuonConfig,
    MuParamConfig,
)
from lightning_llm.optimization.mu_param import mu_scale
from lightning_llm.optimization.muon import orthogonalised, update_size
from lightning_llm.optimization.window import LossSum, optimizer_step

CONFIGS = [AdamWConfig(), LionConfig(), AFMRMSPropConfig(), MuonConfig()]


def by_name(config):
    return config.name


@pytest.fixture
def model():
    return transformer()


def transformer(width=8, **named):
    named = {"vocab_size": 10, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True} | named
    config = ModelConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, **named)
    model = Transformer(config)
    model.reset_parameters(seed=1)
    return model


def groups_of(model, optimizer):
    """name -> the group of that parameter"""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


# ---- groups ----


@pytest.mark.parametrize("kind", [type(config) for config in CONFIGS], ids=lambda kind: kind.name)
def test_matrices_decay_and_vectors_do_not(model, kind):
    model.norm.requires_grad_(False)
    groups = groups_of(model, kind(weight_decay=0.3).build(model))
    for name, group in groups.items():
        assert group["weight_decay"] == (0.0 if "norm" in name or name.endswith("bias") else 0.3), name
        assert group["lr_scale"] == 1.0
    assert groups["embed_tokens.weight"]["weight_decay"] == 0.3
    assert "norm.weight" not in groups
    assert len(groups) == len(list(model.parameters())) - 1


def test_adamw_is_fused_torchs(model):
    optimizer = AdamWConfig(betas=(0.8, 0.9), eps=1e-5).build(model)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.9), 1e-5)


def test_muon_takes_the_matrices_of_the_layers_and_tells_queries_keys_and_values_apart():
    model = transformer(tie_word_embeddings=False)
    groups = groups_of(model, MuonConfig(adamw_lr_scale=0.02).build(model))
    muon = {name: group["parts"] for name, group in groups.items() if group["parts"] is not None}
    assert {name for name in muon if name.startswith("layers.0.")} == {
        f"layers.0.{part}.weight"
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert all(name.startswith("layers.") for name in muon)
    assert muon["layers.1.self_attn.qkv_proj.weight"] == (8, 4, 4)
    assert muon["layers.1.mlp.up_proj.weight"] == ()
    assert {group["lr_scale"] for group in groups.values() if group["parts"] is None} == {0.02}


# ---- one parameter of each kind under the formula ----


def plain_adamw(config, lr, s, gradients, theta, decay):
    (b1, b2), m, v = config.betas, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        theta = theta - lr * decay * theta
        theta = theta - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + config.eps)
    return theta


def plain_lion(config, lr, s, gradients, theta, decay):
    (b1, b2), m = config.betas, 0.0
    for g in gradients:
        theta = theta - lr * (np.sign(b1 * m + (1 - b1) * g) + decay * theta)
        m = b2 * m + (1 - b2) * g
    return theta


def plain_afm(config, lr, s, gradients, theta, decay):
    (b1, b2), m, v = config.betas, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        v = b2 * v + (1 - b2) * (g**2 + config.eps)
        u = g / np.sqrt(v / (1 - b2**t))
        if config.update_clip:
            u = u / max(1.0, math.sqrt((u**2).mean()) / config.update_clip)
        m = b1 * m + (1 - b1) * u
        theta = theta - (lr * m + s * decay * theta)
    return theta


def plain_muon(config, lr, s, gradients, theta, decay, parts=()):
    """With the polynomial on singular values; the code has no singular value decomposition."""
    if theta.ndim == 1:
        return plain_adamw(config, lr * config.adamw_lr_scale, s, gradients, theta, decay)
    if theta.ndim == 3:
        columns = [plain_muon(config, lr, s, [g[i] for g in gradients], theta[i], decay) for i in range(len(theta))]
        return np.stack(columns)
    if parts:
        cut = np.cumsum(parts)[:-1]
        pieces = zip(np.split(theta, cut), *(np.split(g, cut) for g in gradients), strict=True)
        return np.concatenate([plain_muon(config, lr, s, g, piece, decay) for piece, *g in pieces])
    m = 0.0
    for g in gradients:
        m = config.momentum * m + (1 - config.momentum) * g
        d = config.momentum * m + (1 - config.momentum) * g if config.nesterov else m
        left, values, right = np.linalg.svd(d, full_matrices=False)
        values = values / np.sqrt((d**2).sum())
        for _ in range(config.newton_schulz_steps):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        rows, columns = theta.shape
        size = 0.2 * max(rows, columns) ** 0.5 if config.update_scale == "adamw" else max(1.0, rows / columns) ** 0.5
        theta = theta - lr * decay * theta - lr * size * (left * values) @ right
    return theta


FORMULAS = {
    "adamw": (AdamWConfig(), plain_adamw),
    "lion": (LionConfig(), plain_lion),
    "lion, other betas": (LionConfig(betas=(0.5, 0.8), weight_decay=0.0), plain_lion),
    "afm_rmsprop": (AFMRMSPropConfig(weight_decay=0.01), plain_afm),
    "afm_rmsprop, unclipped": (AFMRMSPropConfig(update_clip=0.0, betas=(0.3, 0.6)), plain_afm),
    "afm_rmsprop, clipped": (AFMRMSPropConfig(update_clip=0.2, weight_decay=0.01), plain_afm),
    "muon": (MuonConfig(newton_schulz_precision="fp32"), plain_muon),
    "muon, spectral": (
        MuonConfig(newton_schulz_precision="fp32", update_scale="spectral", nesterov=False, adamw_lr_scale=0.1),
        plain_muon,
    ),
}


class Parameters(nn.Module):
    """A tall matrix, a wide one, one of three parts, a stack and a vector."""

    SHAPES = ((6, 3), (3, 6), (7, 4), (3, 4, 5), (5,))

    def __init__(self, chance):
        super().__init__()
        self.layers = nn.ModuleList()
        for shape in self.SHAPES:
            holder = nn.Module()
            holder.weight = nn.Parameter(torch.from_numpy(chance.normal(size=shape)).float())
            self.layers.append(holder)
        self.layers[2].parts = (4, 1, 2)


@pytest.mark.parametrize(("config", "formula"), FORMULAS.values(), ids=FORMULAS.keys())
def test_steps_are_the_published_formula(config, formula):
    """Five steps with gradients of unlike sizes, decay and momentum among them."""
    chance = np.random.default_rng(0)
    module = Parameters(chance)
    before = [parameter.detach().double().numpy().copy() for parameter in module.parameters()]
    gradients = [[chance.normal(size=s) * 10.0**-step for s in module.SHAPES] for step in range(5)]
    optimizer = config.build(module)
    for step in gradients:
        for parameter, gradient in zip(module.parameters(), step, strict=True):
            parameter.grad = torch.from_numpy(gradient).float()
        for group in optimizer.param_groups:
            group["lr"], group["schedule"] = 0.03 * group["lr_scale"], 0.6
        optimizer.step()
    for index, (parameter, start) in enumerate(zip(module.parameters(), before, strict=True)):
        own = [step[index].astype(np.float32).astype(np.float64) for step in gradients]
        decay = config.weight_decay if start.ndim > 1 else 0.0
        more = {"parts": module.layers[index].parts} if index == 2 and formula is plain_muon else {}
        expected = formula(config, 0.03, 0.6, own, start, decay, **more)
        assert not np.allclose(expected, start, atol=1e-3)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_a_copy_from_its_state_goes_on_as_the_original(model, config):
    """All that an optimizer remembers are tensors in `state`."""
    optimizer, chance = config.build(model), torch.Generator().manual_seed(0)

    def step(model, optimizer, gradients):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"], group["schedule"] = 1e-2 * group["lr_scale"], 1.0
        optimizer.step()

    gradients = [[torch.randn(p.shape, generator=chance) for p in model.parameters()] for _ in range(4)]
    for each in gradients[:2]:
        step(model, optimizer, each)
    assert all(isinstance(value, torch.Tensor) for state in optimizer.state.values() for value in state.values())
    other = copy.deepcopy(model)
    resumed = config.build(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in gradients[2:]:
        step(model, optimizer, each)
        step(other, resumed, each)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


# ---- numbers known by hand ----


def one_matrix(config, gradient, *, schedule=1.0):
    module = nn.Linear(3, 2, bias=False)
    nn.init.ones_(module.weight)
    optimizer = config.build(module)
    module.weight.grad = torch.full((2, 3), gradient)
    optimizer_step_of(optimizer, schedule)
    return module.weight.detach(), optimizer.state[module.weight]


def optimizer_step_of(optimizer, schedule):
    for group in optimizer.param_groups:
        group["lr"], group["schedule"] = 0.1 * group["lr_scale"], schedule
    optimizer.step()


def test_the_first_step_of_afm_is_the_sign_with_a_cold_momentum():
    weight, state = one_matrix(AFMRMSPropConfig(weight_decay=0.0), -7.0)
    torch.testing.assert_close(weight, torch.full((2, 3), 1 + 0.1 * 0.05))
    torch.testing.assert_close(state["exp_avg"], torch.full((2, 3), -0.05))


def test_without_a_gradient_afm_only_decays_by_the_schedule():
    weight, _ = one_matrix(AFMRMSPropConfig(weight_decay=0.2), 0.0, schedule=0.5)
    torch.testing.assert_close(weight, torch.full((2, 3), 0.9))


def test_orthogonal_matrices_have_singular_values_near_one():
    """Of any scale; wide, tall and square; in bf16 as in fp32."""
    chance = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16), (1, 24, 24)):
        matrices = torch.randn(shape, generator=chance) * 1e-4
        for dtype in (torch.bfloat16, torch.float32):
            result = orthogonalised(matrices, steps=5, dtype=dtype).float()
            values = torch.linalg.svdvals(result)
            assert result.shape == matrices.shape
            # a square matrix of noise has singular values at 0, which five steps do not lift
            assert values.max() < 1.3
            assert values.median() > 0.65
            left, _, right = torch.linalg.svd(matrices, full_matrices=False)
            inner = (left @ right * result).sum((1, 2)) / result.norm(dim=(1, 2)) / min(shape[1:]) ** 0.5
            assert inner.min() > 0.95
    assert not orthogonalised(torch.zeros(1, 3, 4), steps=5, dtype=torch.float32).any()


def test_muons_updates_are_as_large_as_adamws():
    weight = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))[0]
    assert (weight * update_size(64, 16, "adamw")).square().mean().sqrt() == pytest.approx(0.2)
    assert update_size(64, 16, "spectral") == 2.0
    assert update_size(16, 64, "spectral") == 1.0


# ---- muParam ----


@pytest.mark.parametrize(
    ("name", "shape", "scale"),
    [
        ("layers.3.self_attn.qkv_proj.weight", (5120, 3072), 0.25),
        ("layers.3.mlp.down_proj.weight", (3072, 8064), 0.25),
        ("layers.3.mlp.experts.up_proj", (8, 512, 3072), 0.25),
        ("lm_head.weight", (49152, 3072), 0.25),
        ("embed_tokens.weight", (49152, 3072), 1.0),
        ("layers.3.self_attn.qkv_proj.bias", (5120,), 1.0),
        ("norm.weight", (3072,), 1.0),
    ],
)
def test_mu_param_scales_matrices_alone(name, shape, scale):
    """AFM on-device: tuned at 768, 3,072 wide."""
    assert mu_scale(name, shape, width=3072, base_width=768) == scale
    assert mu_scale(name, shape, width=512, base_width=768) == 1.0
    assert mu_scale(name, shape, width=3072, base_width=None) == 1.0


@pytest.mark.parametrize("kind", [AdamWConfig, LionConfig, AFMRMSPropConfig], ids=by_name)
def test_mu_param_leaves_the_decay_as_it_is(kind):
    """What a step without a gradient takes away is the same for any width."""
    kept = []
    for base_width in (None, 2):
        model = transformer(width=8)
        optimizer = kind(mu_param=MuParamConfig(base_width), weight_decay=0.5).build(model)
        before = model.layers[0].mlp.up_proj.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer_step_of(optimizer, 1.0)
        kept.append(model.layers[0].mlp.up_proj.weight / before)
    torch.testing.assert_close(kept[0], kept[1])
    assert kept[0].max() < 1


def moved_by_one_step(kind, width, base_width):
    """How far one step moves the hidden states and the logits: root mean squares."""
    model = transformer(
        width, vocab_size=64, num_attention_heads=width // 16, num_key_value_heads=width // 16,
        initializer_range=width**-0.5, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.no_grad():
        model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(1))
    model.embed_tokens.requires_grad_(False)
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    batch = SegmentBatch.from_documents(ids)
    optimizer = kind(mu_param=MuParamConfig(base_width), weight_decay=0.0).build(model)
    with torch.no_grad():
        hidden, logits = model(batch), model.logits(model(batch))
    objective = CausalLM(CausalLMConfig(), model)
    for _ in range(2):  # the momentum of a first step is a cold start
        optimizer_step(objective.loss, [batch], optimizer, units=60, learning_rate=1e-3)
    with torch.no_grad():
        moved = model(batch) - hidden, model.logits(model(batch)) - logits
    return [float(change.square().mean().sqrt()) for change in moved]


@pytest.mark.parametrize("kind", [AdamWConfig, LionConfig, AFMRMSPropConfig], ids=by_name)
def test_coordinate_check(kind):
    """Under muParam a step moves activations equally far for every width; without it the wider model moves further."""
    widths = (32, 64, 128, 256)
    scaled = np.array([moved_by_one_step(kind, width, 32) for width in widths])
    plain = np.array([moved_by_one_step(kind, width, None) for width in widths])
    np.testing.assert_array_equal(scaled[0], plain[0])
    assert (scaled[-1] / scaled[0] < 1.6).all()
    assert (scaled[-1] / scaled[0] > 0.6).all()
    assert (plain[-1] / plain[0] > 3).all()


# ---- with the window ----


EXPERTS = {
    "family": "qwen2_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5,
    "shared_expert_intermediate_size": 7, "attention_bias": True, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("named", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_a_plan_knows_how_much_is_remembered(config, named):
    model = transformer(**named)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = config.build(model)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    remembered = sum(value.numel() * value.element_size() for value in kept if value.ndim)  # counts of steps have none
    counts = parameter_counts(model.config)
    assert type(config).state_bytes(counts["total"], counts["matrices"]) == remembered


@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_a_few_steps_of_each_lower_the_loss(model, config):
    batch = SegmentBatch.from_documents([[1, 2, 3, 4, 5, 6, 7, 8, 9] * 3])
    objective = CausalLM(CausalLMConfig(), model)
    optimizer = config.build(model)
    losses = [
        optimizer_step(
            objective.loss, [batch], optimizer, units=26, learning_rate=1e-2, clip_norm=config.clip_norm
        ).means()["loss"]
        for _ in range(40)
    ]
    assert losses[0] == pytest.approx(math.log(10), rel=0.05)
    assert losses[-1] < 0.8 * losses[0]


def test_the_window_says_where_the_schedule_is(model):
    optimizer = AFMRMSPropConfig(weight_decay=0.5).build(model)
    before = model.layers[0].mlp.up_proj.weight.detach().clone()

    def nothing(batch):
        return LossSum(sum(parameter.sum() for parameter in model.parameters()) * 0.0, 1)

    optimizer_step(nothing, [None], optimizer, units=1, learning_rate=1.0, schedule=0.2)
    torch.testing.assert_close(model.layers[0].mlp.up_proj.weight.detach(), 0.9 * before)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (AdamWConfig, {"betas": (0.9, 1.0)}),
        (AdamWConfig, {"betas": (0.9, 0.95, 0.99)}),
        (LionConfig, {"weight_decay": -0.1}),
        (AFMRMSPropConfig, {"update_clip": -1.0}),
        (MuonConfig, {"momentum": 1.0}),
        (MuonConfig, {"newton_schulz_steps": 0}),
        (MuonConfig, {"newton_schulz_precision": "fp8"}),
        (MuonConfig, {"update_scale": "jordan"}),
        (MuParamConfig, {"base_width": 0}),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(kind, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kind(**wrong)
