"""Policy gradients against exact enumeration: the real model on a vocabulary of three, where all responses are known.

With entry 2 for the end and two tokens at most there are seven responses to a prompt. The expectation of an objective's
gradient over all 49 pairs of them, each with its probability, has to be the gradient of what the objective stands for,
and that is written down here from dense logits, without any of the code under test.
"""

import copy
import itertools

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.objectives.config import DAPOConfig, GRPOConfig, MDPOConfig, PPOConfig, RLOOConfig

PROMPT = [0, 1, 1]
RESPONSES = [[2], [0, 2], [1, 2], [0, 0], [0, 1], [1, 0], [1, 1]]
REWARDS = torch.tensor([0.3, 1.0, -0.5, 0.0, 0.7, -1.0, 0.2], dtype=torch.float64)
PAIRS = list(itertools.product(range(7), repeat=2))
BETA = 0.3


def transformer(seed):
    config = ModelConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.7,
    )
    model = Transformer(config)
    model.reset_parameters(seed)
    return model.double()


def table(model):
    """Log-probability of every token of the seven responses, from dense logits: [7, 2], 0 where there is no token."""
    rows = []
    for response in RESPONSES:
        document = SegmentBatch.from_documents([PROMPT + response])
        logps = model.logits(model(document)).log_softmax(-1)
        tokens = [logps[len(PROMPT) - 1 + place, token] for place, token in enumerate(response)]
        rows.append(torch.stack([*tokens, logps.new_zeros(())][:2]))
    return torch.stack(rows)


LENGTHS = torch.tensor([len(response) for response in RESPONSES])
IS_TOKEN = torch.arange(2) < LENGTHS[:, None]  # [7, 2]


@pytest.fixture(scope="module")
def policy():
    return transformer(1)


@pytest.fixture(scope="module")
def reference():
    return table(transformer(2)).detach()


@pytest.fixture(scope="module")
def iterates(policy):
    """By name: the policy itself, and one that it has moved away from."""
    moved, generator = copy.deepcopy(policy), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return {"the policy": table(policy).detach(), "an earlier one": table(moved).detach()}


def batch_of(groups, iterate, reference):
    """Groups of responses, by number, with all columns."""
    batch = SegmentBatch.from_groups([PROMPT] * len(groups), [[RESPONSES[i] for i in group] for group in groups])
    everyone = [number for group in groups for number in group]
    rewards = [entry for group in groups for entry in [0.0, *REWARDS[list(group)].tolist()]]
    batch.columns.update(
        sampled_logps=torch.cat([iterate[i][IS_TOKEN[i]] for i in everyone]),
        reference_logps=torch.cat([reference[i][IS_TOKEN[i]] for i in everyone]),
        rewards=torch.tensor(rewards, dtype=torch.float64),
    )
    # the prompt's own tokens are targets that do not count: their columns are never looked at
    full = torch.zeros(len(batch.target_ids), dtype=torch.float64)
    for name in ("sampled_logps", "reference_logps"):
        column = full.clone()
        column[batch.target_mask] = batch.columns[name]
        batch.columns[name] = column
    return batch


def gradient(value, model):
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(model.parameters(), grads, strict=True)]
    )


def expected_gradient(config, policy, iterate, reference):
    """Mean over all pairs of responses, as the iterate draws them, of the gradient of the loss per unit."""
    objective, probabilities = config.build(policy), iterate.sum(1).exp()
    losses = []
    for i, j in PAIRS:
        part = objective.loss(batch_of([(i, j)], iterate, reference))
        losses.append(probabilities[i] * probabilities[j] * part.loss)
    return gradient(torch.stack(losses).sum() / 2, policy)  # two responses to a pair


def mean_reward(policy, iterate, reference, beta):
    """E_policy[R], with the KL's price as the iterate was charged it: at the iterate R's own gradient has mean 0."""
    rewards = REWARDS - beta * (iterate - reference).sum(1)
    return (table(policy).sum(1).exp() * rewards).sum()


def kl(p, q):
    return (p.sum(1).exp() * (p - q).sum(1)).sum()


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def test_the_seven_responses_are_all_there_are(policy):
    torch.testing.assert_close(table(policy).sum(1).exp().sum(), torch.ones((), dtype=torch.float64))


def test_rloo_has_the_gradient_of_reward_less_kl(policy, iterates, reference):
    now = iterates["the policy"]
    found = expected_gradient(RLOOConfig(beta=BETA), policy, now, reference)
    objective = (table(policy).sum(1).exp() * REWARDS).sum() - BETA * kl(table(policy), reference)
    torch.testing.assert_close(found, -gradient(objective, policy), **CLOSE)


@pytest.mark.parametrize("iterate", ["the policy", "an earlier one"])
def test_mdpo_has_the_gradient_of_its_objective(iterate, policy, iterates, reference):
    earlier = iterates[iterate]
    found = expected_gradient(MDPOConfig(beta=BETA, gamma=0.4), policy, earlier, reference)
    objective = mean_reward(policy, earlier, reference, BETA) - 0.4 * kl(table(policy), earlier)
    torch.testing.assert_close(found, -gradient(objective, policy), **CLOSE)


def test_mdpo_by_tokens_sums_the_kl_of_every_step(policy, iterates, reference):
    earlier = iterates["an earlier one"]
    found = expected_gradient(MDPOConfig(beta=BETA, gamma=0.4, trust_region="token"), policy, earlier, reference)
    # KL(policy || iterate) of each step, at the states in which the iterate comes there
    region = torch.zeros((), dtype=torch.float64)
    for prefix, weight in (([], 1.0), ([0], None), ([1], None)):
        document = SegmentBatch.from_documents([PROMPT + prefix])
        state = policy.logits(policy(document))[-1].log_softmax(-1)
        numbers = [
            next(n for n, r in enumerate(RESPONSES) if r[: len(prefix) + 1] == [*prefix, token]) for token in range(3)
        ]
        old = torch.stack([earlier[n][len(prefix)] for n in numbers])
        weight = weight or earlier[numbers[0]][0].exp()
        region = region + weight * (state.exp() * (state - old)).sum()
    objective = mean_reward(policy, earlier, reference, BETA) - 0.4 * region
    torch.testing.assert_close(found, -gradient(objective, policy), **CLOSE)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_ppo_at_the_iterate_has_the_gradient_of_reward_less_kl(ratio, policy, iterates, reference):
    found = expected_gradient(PPOConfig(beta=BETA, ratio=ratio), policy, iterates["the policy"], reference)
    objective = (table(policy).sum(1).exp() * REWARDS).sum() - BETA * kl(table(policy), reference)
    torch.testing.assert_close(found, -gradient(objective, policy), **CLOSE)


def enumerated(policy, iterate, advantage, per_response, units):
    """E over pairs of a loss that is written per response from its tokens' log-ratios, advantage and number."""
    now, probabilities, total = table(policy), iterate.sum(1).exp(), 0
    for i, j in PAIRS:
        for own, other in ((i, j), (j, i)):
            cost = per_response((now - iterate)[own][IS_TOKEN[own]], advantage(own, other), own)
            total = total + probabilities[i] * probabilities[j] * cost / units
    return total


def clip(ratio, advantage, low, high):
    bounded = min(max(ratio.item(), 1 - low), 1 + high)
    return (
        ratio * advantage
        if (ratio * advantage).item() <= bounded * advantage
        else ratio.new_tensor(bounded * advantage)
    )


def deviation(i, j):
    """Of two rewards, with one degree of freedom."""
    return abs(i - j) / 2**0.5


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_ppo_further_on_is_the_clipped_surrogate(ratio, policy, iterates, reference):
    earlier = iterates["an earlier one"]
    rewards = (REWARDS - BETA * (earlier - reference).sum(1)).tolist()

    def cost(log_ratios, advantage, _):
        ratios = log_ratios.exp() if ratio == "token" else log_ratios.sum().exp()[None]
        return -sum(clip(r, advantage, 0.05, 0.1) for r in ratios)

    expected = enumerated(policy, earlier, lambda own, other: rewards[own] - rewards[other], cost, 2)
    config = PPOConfig(beta=BETA, ratio=ratio, clip_low=0.05, clip_high=0.1)
    torch.testing.assert_close(
        expected_gradient(config, policy, earlier, reference), gradient(expected, policy), **CLOSE
    )


def normalised(rewards):
    def advantage(own, other):
        return (rewards[own] - rewards[other]) / 2 / (deviation(rewards[own], rewards[other]) + 1e-4)

    return advantage


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_grpo_averages_tokens_and_adds_the_kl(estimator, policy, iterates, reference):
    earlier, now = iterates["an earlier one"], table(policy)

    def cost(log_ratios, advantage, own):
        apart = (reference - now)[own][IS_TOKEN[own]]
        divergence = {"k1": -apart, "k2": apart**2 / 2, "k3": apart.exp() - 1 - apart}[estimator]
        surrogate = torch.stack([clip(r, advantage, 0.05, 0.1) for r in log_ratios.exp()])
        return (-surrogate + BETA * divergence).mean()

    expected = enumerated(policy, earlier, normalised(REWARDS.tolist()), cost, 2)
    config = GRPOConfig(beta=BETA, clip_low=0.05, clip_high=0.1, kl_estimator=estimator)
    torch.testing.assert_close(
        expected_gradient(config, policy, earlier, reference), gradient(expected, policy), **CLOSE
    )


def test_dapo_counts_every_token_alike(policy, iterates, reference):
    earlier = iterates["an earlier one"]

    def cost(log_ratios, advantage, _):
        return -sum(clip(r, advantage, 0.05, 0.3) for r in log_ratios.exp())

    expected = enumerated(policy, earlier, normalised(REWARDS.tolist()), cost, 2)
    found = expected_gradient(DAPOConfig(clip_low=0.05, clip_high=0.3), policy, earlier, reference)
    torch.testing.assert_close(found, gradient(expected, policy), **CLOSE)
    part = DAPOConfig().build(policy).loss(batch_of([(0, 3), (1, 5)], earlier, reference))
    assert part.count == 1 + 2 + 2 + 2


CONFIGS = [RLOOConfig(), MDPOConfig(), MDPOConfig(trust_region="token"), PPOConfig(), PPOConfig(ratio="sequence"),
           GRPOConfig(), DAPOConfig()]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_split_into_micro_batches_changes_nothing(config, policy, iterates, reference):
    objective, earlier = config.build(policy), iterates["an earlier one"]
    groups = [(0, 1, 2), (3, 4, 4), (6, 5, 1)]
    whole = objective.loss(batch_of(groups, earlier, reference))
    parts = [objective.loss(batch_of([group], earlier, reference)) for group in groups]
    torch.testing.assert_close(whole.loss, torch.stack([part.loss for part in parts]).sum())
    assert whole.count == sum(part.count for part in parts)
    for name, (total, count) in whole.metrics.items():
        assert count == sum(part.metrics[name][1] for part in parts)
        torch.testing.assert_close(
            total, torch.stack([part.metrics[name][0] for part in parts]).sum(), check_dtype=False
        )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_batch_that_fills_up_a_rank_counts_nothing(config, policy):
    filler = SegmentBatch.from_documents([[0, 1]], masks=[[0, 0]])
    zeros = torch.zeros(len(filler.target_ids), dtype=torch.float64)
    filler.columns.update(sampled_logps=zeros, reference_logps=zeros, rewards=torch.zeros(1, dtype=torch.float64))
    part = config.build(policy).loss(filler)
    part.loss.backward()
    assert (part.count, part.loss.item()) == (0, 0.0)
    assert all(count == 0 for _, count in part.metrics.values())
    policy.zero_grad()


def test_metrics(policy, iterates, reference):
    earlier = iterates["an earlier one"]
    metrics = (
        PPOConfig(clip_low=0.01, clip_high=0.01)
        .build(policy)
        .loss(batch_of([(0, 1), (2, 2)], earlier, reference))
        .metrics
    )
    means = {name: (total / count).item() for name, (total, count) in metrics.items()}
    numbers = [0, 1, 2, 2]
    told_of_the_window = {"reward/mean", "kl/reference", "entropy"}  # training/rollout.py:figures
    assert not told_of_the_window & metrics.keys()
    assert means["reward/std"] == pytest.approx(deviation(0.3, 1.0) / 2)
    log_ratio = (table(policy) - earlier).sum(1)[numbers].detach()
    assert means["kl/iterate"] == pytest.approx(
        (log_ratio.exp() * log_ratio - log_ratio.expm1()).mean().item(), rel=1e-4
    )
    ratios = torch.cat([(table(policy) - earlier)[i][IS_TOKEN[i]] for i in numbers]).exp()
    assert means["ratio/clipped"] == pytest.approx(((ratios - 1).abs() > 0.01).double().mean().item())
