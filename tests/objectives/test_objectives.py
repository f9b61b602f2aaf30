"""What all objectives share: frozen models stay outside, and the loss is the pure one on the batch's quantities."""

import copy

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.objectives.base import token_logps
from lightning_llm.objectives.config import CausalLMConfig, DPOConfig, IPOConfig

PROMPTS = [[1, 2, 3], [4, 5]]
RESPONSES = [[[6, 7, 9], [8, 9]], [[13, 9], [10, 11, 12, 9]]]  # chosen, rejected; 9 ends a turn


def transformer(seed):
    config = ModelConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = Transformer(config)
    model.reset_parameters(seed)
    return model


@pytest.fixture
def policy():
    return transformer(1)


@pytest.fixture
def reference():
    return transformer(2)


@pytest.fixture
def batch():
    return SegmentBatch.from_groups(PROMPTS, RESPONSES)


def plain_logps(model, skip=()):
    """Sequence log-probabilities of chosen [P] and rejected [P] in float64, each a document of its own."""
    sums = []
    for prompt, responses in zip(PROMPTS, RESPONSES, strict=True):
        for response in responses:
            document = SegmentBatch.from_documents([prompt + response])
            table = log_softmax(model.logits(model(document)).double(), -1)
            steps = range(len(prompt), len(prompt) + len(response))
            ids = prompt + response
            sums.append(sum((table[i - 1, ids[i]] for i in steps if ids[i] not in skip), torch.zeros(()).double()))
    return torch.stack(sums[0::2]), torch.stack(sums[1::2])


def with_column(batch, reference):
    with torch.no_grad():
        batch.columns["reference_logps"] = token_logps(reference, batch)
    return batch


@pytest.mark.parametrize("online", [False, True], ids=["column", "model"])
@pytest.mark.parametrize("nll_weight", [0.0, 0.2])
@pytest.mark.parametrize("mask_formatting", [False, True], ids=["all tokens", "no formatting"])
def test_dpo_is_the_formula_on_responses_computed_apart(policy, reference, batch, online, nll_weight, mask_formatting):
    config = DPOConfig(beta=0.3, nll_weight=nll_weight, mask_formatting=mask_formatting, label_smoothing=0.1)
    objective = config.build(policy, reference=reference if online else None, formatting_ids={9})
    part = objective.loss(batch if online else with_column(batch, reference))
    part.loss.backward()
    gradients = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()

    skipped = {9} if mask_formatting else ()
    chosen, rejected = plain_logps(policy, skipped)
    with torch.no_grad():
        reference_chosen, reference_rejected = plain_logps(reference, skipped)
    margin = 0.3 * (chosen - reference_chosen - rejected + reference_rejected)
    expected = -0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin)
    lengths = torch.tensor([len(pair[0]) for pair in RESPONSES])
    expected = expected - nll_weight * plain_logps(policy)[0] / lengths
    torch.testing.assert_close(part.loss.double(), expected.sum(), rtol=1e-5, atol=1e-5)
    assert part.count == 2
    expected.sum().backward()
    for gradient, parameter in zip(gradients, policy.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
    margin, chosen, rejected = margin.detach(), chosen.detach(), rejected.detach()
    sums = {name: float(total) for name, (total, count) in part.metrics.items()}
    assert sums["rewards/margins"] == pytest.approx(float(margin.sum()), abs=1e-4)
    assert sums["rewards/margins"] == pytest.approx(sums["rewards/chosen"] - sums["rewards/rejected"], abs=1e-5)
    assert sums["rewards/accuracies"] == (margin > 0).sum()
    assert sums["logps/chosen"] == pytest.approx(float(chosen.sum()), abs=1e-4)
    assert sums["logps/rejected"] == pytest.approx(float(rejected.sum()), abs=1e-4)


def test_ipo_draws_the_margin_to_its_target(policy, reference, batch):
    part = IPOConfig(beta=0.25).build(policy).loss(with_column(batch, reference))
    (chosen, rejected), (reference_chosen, reference_rejected) = plain_logps(policy), plain_logps(reference)
    margins = chosen - rejected - reference_chosen + reference_rejected
    torch.testing.assert_close(part.loss.double(), ((margins - 2.0) ** 2).sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("config", [CausalLMConfig(), DPOConfig(nll_weight=0.2)], ids=lambda config: config.name)
def test_a_batch_in_which_nothing_counts_has_no_units_and_no_gradient(policy, config):
    filler = SegmentBatch.from_segments([[1, 2]], [-1], [[False, False]], {"reference_logps": [None]})
    part = config.build(policy).loss(filler)
    part.loss.backward()
    assert part.loss == 0
    assert part.count == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in policy.parameters())


def test_gradients_reach_every_parameter_also_where_nothing_counts(policy):
    """Otherwise a rank that got such a micro-batch last would keep the others waiting."""
    filler = SegmentBatch.from_segments([[1, 2]], [-1], [[False, False]], {"reference_logps": [None]})
    for config in (CausalLMConfig(), DPOConfig()):
        policy.zero_grad(set_to_none=True)
        config.build(policy).loss(filler).loss.backward()
        assert [name for name, p in policy.named_parameters() if p.grad is None] == []


def test_a_frozen_model_is_no_part_of_the_objective(policy, reference):
    reference.train()
    objective = DPOConfig().build(policy, reference=reference)
    objective.train()
    assert not any(module is reference for module in objective.modules())
    assert set(objective.state_dict()) == {f"model.{name}" for name in policy.state_dict()}
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_the_reference_gets_no_gradient_and_the_start_costs_log_2(policy, batch):
    part = DPOConfig().build(policy, reference=copy.deepcopy(policy)).loss(batch)
    assert part.loss.item() / part.count == pytest.approx(0.693147, abs=1e-5)


def test_token_logps_are_zero_where_nothing_counts(policy):
    batch = SegmentBatch.from_documents([[1, 2, 3, 4]], [[True, True, False, True]])
    logps = token_logps(policy, batch)
    table = log_softmax(policy.logits(policy(batch)), -1)
    expected = torch.stack([table[0, 2], table.new_zeros(()), table[2, 4]])
    torch.testing.assert_close(logps, expected)


@pytest.mark.parametrize(
    "wrong", [lambda: DPOConfig(beta=0.0), lambda: IPOConfig(nll_weight=-1.0), lambda: DPOConfig(label_smoothing=0.5)]
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"beta|nll_weight|label_smoothing"):
        wrong()
