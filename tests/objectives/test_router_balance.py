"""What routers pay for sending tokens unevenly: with any objective, a mean by tokens, and nothing of a dense model."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_llm.batch import SegmentBatch
from lightning_llm.losses.load_balance import load_balancing_loss
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.objectives.config import CausalLMConfig, DPOConfig
from lightning_llm.optimization.config import AdamWConfig
from lightning_llm.optimization.optimizers import build_adamw
from lightning_llm.optimization.window import optimizer_step

ADAMW = AdamWConfig(eps=1e-5)
LENGTHS = (31, 4, 17, 9)


def mixture(seed=1, **changes) -> Transformer:
    shape = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    experts = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=12)
    config = ModelConfig(
        **{**shape, "family": "qwen2_moe", "num_key_value_heads": 2, "initializer_range": 0.3, **experts, **changes}
    )
    model = Transformer(config)
    model.reset_parameters(seed)
    return model


def batch(*indices: int) -> SegmentBatch:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(50, (length,), generator=generator).tolist() for length in LENGTHS]
    return SegmentBatch.from_documents([documents[i] for i in indices])


def masked() -> SegmentBatch:
    return SegmentBatch.from_documents([[1, 2, 3]], [[False] * 3])


def step(model, micro_batches, **named):
    model = copy.deepcopy(model)
    objective = CausalLMConfig().build(model)
    units, tokens = sum(length - 1 for length in LENGTHS), sum(LENGTHS)
    totals = optimizer_step(
        objective.trained_loss, micro_batches, build_adamw(ADAMW, model), units=units, tokens=tokens,
        learning_rate=2e-3, **named,
    )  # fmt: skip
    return model, totals.means()


def balance(model) -> torch.Tensor:
    routed = model.take_routed()
    probability, load = (torch.stack([getattr(layer, name) for layer in routed]) for name in ("probability", "load"))
    return load_balancing_loss(probability, load, routed[0].tokens)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_gradient_is_that_of_the_mean_over_targets_and_of_the_mean_by_tokens(weight):
    model = mixture(router_aux_loss_coef=weight)
    parts = [batch(0, 1), batch(2, 3)]
    _, means = step(model, parts)
    losses, balances = [], []
    for part in parts:
        logits = model.logits(model(part))
        losses.append(cross_entropy(logits[part.predictors], part.target_ids, reduction="sum"))
        balances.append(balance(model) * len(part.input_ids))
    mean, balanced = sum(losses) / (sum(LENGTHS) - len(LENGTHS)), sum(balances) / sum(LENGTHS)
    (mean + weight * balanced).backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    assert means["loss"] == pytest.approx(mean.item(), rel=1e-5)  # as in a dense model, without the routers' share
    assert means["router/aux_loss"] == pytest.approx(balanced.item(), rel=1e-5)
    assert means["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert 1 < means["router/imbalance"] <= 3


def test_without_its_weight_any_split_gives_the_same_update():
    model = mixture(router_aux_loss_coef=0.0)
    whole, means = step(model, [batch(0, 1, 2, 3)])
    parts, split = step(model, [batch(2), batch(0), batch(3, 1), masked()])
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)
    assert split["loss"] == pytest.approx(means["loss"], rel=1e-5)


def test_what_only_fills_up_adds_exactly_zero():
    model = mixture(router_aux_loss_coef=0.5)
    without, means = step(model, [batch(0, 1, 2, 3)])
    filled, filled_means = step(model, [masked(), batch(0, 1, 2, 3)])
    assert all(torch.equal(one, other) for one, other in zip(without.parameters(), filled.parameters(), strict=True))
    assert filled_means == means


def test_preference_pairs_pay_for_the_policy_alone():
    policy, reference = mixture(1), mixture(2)
    pairs = SegmentBatch.from_groups([[1, 2, 3], [4, 5]], [[[6, 7, 9], [8, 9]], [[13, 9], [10, 11, 12, 9]]])
    part = DPOConfig(beta=0.1).build(policy, reference=reference).trained_loss(pairs)
    policy(pairs)
    expected, tokens = balance(policy), len(pairs.input_ids)
    assert part.metrics["router/aux_loss"][0].item() / tokens == pytest.approx(expected.item(), rel=1e-6)
    assert part.per_token.item() == pytest.approx(0.001 * tokens * expected.item(), rel=1e-6)
    part.per_token.backward()
    assert policy.layers[1].mlp.gate.weight.grad.norm() > 0
    assert reference.layers[1].mlp.gate.weight.grad is None
    assert {"rewards/margins", "router/imbalance"} <= part.metrics.keys()


def test_a_dense_model_pays_nothing():
    dense = mixture(family="qwen2", num_experts=0)
    part = CausalLMConfig().build(dense).trained_loss(batch(0))
    assert part.per_token is None
    assert not part.metrics


def test_its_weight_evens_the_load():
    after = {}
    for weight in (0.0, 1.0):
        model = mixture(router_aux_loss_coef=weight)
        for _ in range(40):
            model, means = step(model, [batch(0, 1, 2, 3)])
        after[weight] = means
    assert after[1.0]["router/aux_loss"] < after[0.0]["router/aux_loss"] - 0.02
    assert after[1.0]["router/aux_loss"] == pytest.approx(2, abs=0.1)  # even: num_experts_per_tok


def test_every_expert_is_a_matrix_to_the_optimizer():
    model = mixture()
    groups = build_adamw(ADAMW, model).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert {f"layers.0.mlp.experts.{part}_proj.weight" for part in ("gate_up", "down")} <= names
    assert "layers.0.mlp.gate.weight" in names
    assert not any("norm" in name or "bias" in name for name in names)
