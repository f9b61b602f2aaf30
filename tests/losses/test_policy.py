"""Policy losses against their formulas in plain floats, and estimators against a policy that can be enumerated."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_llm.losses.policy import (
    KL_ESTIMATORS,
    group_normalised,
    kl_estimate,
    leave_one_out,
    mdpo_loss,
    penalised_rewards,
    ppo_clip_loss,
    reinforce_loss,
    trust_region,
)

REWARDS = arrays("float64", st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-50, 50))


# ---- advantages ----


@given(REWARDS)
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(rewards):
    expected = [[r - (sum(row) - r) / (len(row) - 1) for r in row] for row in rewards.tolist()]
    found = leave_one_out(torch.tensor(rewards))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.sum(1), torch.zeros(len(rewards), dtype=torch.float64), rtol=0, atol=1e-9)


@given(REWARDS)
def test_group_normalised_is_in_units_of_the_deviation(rewards):
    for row, found in zip(
        rewards.tolist(), group_normalised(torch.tensor(rewards), epsilon=1e-4).tolist(), strict=True
    ):
        mean = math.fsum(row) / len(row)
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in row) / (len(row) - 1))
        assert found == pytest.approx([(r - mean) / (deviation + 1e-4) for r in row], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("advantages", [leave_one_out, group_normalised])
def test_one_response_has_nothing_to_be_compared_with(advantages):
    with pytest.raises(ValueError, match="two responses or more"):
        advantages(torch.ones(3, 1))
    assert advantages(torch.full((2, 3), 7.0)).abs().max() == 0


def test_the_penalty_is_beta_times_the_log_ratio():
    found = penalised_rewards(
        torch.tensor([1.0, 0.0]), torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -4.5]), beta=0.1
    )
    assert found.tolist() == pytest.approx([1 - 0.1 * 1.0, 0.1 * 0.5])


# ---- losses, term by term ----

nats = st.floats(-30, 0)


@given(st.lists(st.tuples(nats, nats, st.floats(-5, 5)), min_size=1, max_size=8))
def test_each_loss_is_its_formula(actions):
    logps, old, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*actions, strict=True))
    mask = torch.arange(len(actions)) % 3 != 2
    mirror, clipped = [], []
    for (p, q, a), counts in zip(actions, mask.tolist(), strict=True):
        log_ratio = min(max(p - q, -20), 20)
        rho = math.exp(log_ratio)
        mirror.append(-rho * a + 0.3 * (rho * log_ratio - rho + 1))
        clipped.append(-min(rho * a, min(max(rho, 0.8), 1.28) * a) * counts)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(
        mdpo_loss(logps, old, advantages, gamma=0.3), torch.tensor(mirror, dtype=torch.float64), **close
    )
    found = ppo_clip_loss(logps, old, advantages, mask, clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(found, torch.tensor(clipped, dtype=torch.float64), **close)
    torch.testing.assert_close(reinforce_loss(logps, advantages), -logps * advantages)


def test_at_the_iterate_every_loss_has_reinforces_gradient():
    old = torch.tensor([-1.0, -7.0, -3.0])
    advantages, everyone = torch.tensor([0.5, -1.0, 2.0]), torch.ones(3, dtype=torch.bool)
    for loss in (
        lambda logps: reinforce_loss(logps, advantages),
        lambda logps: mdpo_loss(logps, old, advantages, gamma=5.0),
        lambda logps: ppo_clip_loss(logps, old, advantages, everyone, clip_low=0.2, clip_high=0.2),
    ):
        logps = old.clone().requires_grad_()
        loss(logps).sum().backward()
        torch.testing.assert_close(logps.grad, -advantages)


def test_a_clipped_ratio_earns_nothing_more_and_may_come_back():
    old, everyone = torch.zeros(4), torch.ones(4, dtype=torch.bool)
    logps = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    ppo_clip_loss(logps, old, advantages, everyone, clip_low=0.2, clip_high=0.2).sum().backward()
    assert (logps.grad != 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.0, 0.2), (1.5, 0.2), (0.2, 0.0), (0.2, -1.0)])
def test_bounds_out_of_range(clip_low, clip_high):
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="clip_low"):
        ppo_clip_loss(one, one, one, one == 0, clip_low=clip_low, clip_high=clip_high)


def test_other_mistakes():
    with pytest.raises(ValueError, match="gamma"):
        mdpo_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), gamma=-0.1)
    with pytest.raises(ValueError, match="k1, k2, k3, got 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_a_ratio_never_overflows():
    logps = torch.tensor([0.0, -4000.0], requires_grad=True)
    loss = mdpo_loss(logps, torch.tensor([-4000.0, 0.0]), torch.ones(2), gamma=0.1).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert logps.grad.tolist() == [0, 0]


# ---- estimators, by enumeration ----
# A policy over two tokens of three entries each: 9 responses, all of whose probabilities are known.


def table(seed):
    """Logits of the first token [3] and of the second after each first [3, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((3,), (3, 3))]


def response_logps(logits):
    """Log-probabilities of both tokens of all nine responses [9, 2]."""
    first, second = (part.log_softmax(-1) for part in logits)
    return torch.stack((first.repeat_interleave(3), second.flatten()), dim=1)


def exact_kl(p, q):
    return (p.exp() * (p - q)).sum()


POLICY, REFERENCE = table(1), table(2)


def gradient(value, of=POLICY):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, of, retain_graph=True)])


@pytest.fixture(scope="module")
def logps():
    """Of whole responses [9]: policy and reference."""
    return response_logps(POLICY).sum(1), response_logps(REFERENCE).sum(1).detach()


def test_k1_and_k3_are_unbiased_and_k2_is_not(logps):
    policy, reference = logps
    means = {name: (policy.exp() * kl_estimate(policy, reference, name)).sum().item() for name in KL_ESTIMATORS}
    truth = exact_kl(policy, reference).item()
    assert means["k1"] == pytest.approx(truth, rel=1e-12)
    assert means["k3"] == pytest.approx(truth, rel=1e-12)
    assert abs(means["k2"] - truth) > 0.05 * truth
    assert (kl_estimate(policy, reference, "k3") >= 0).all()
    assert (kl_estimate(policy, reference, "k1") < 0).any()


def test_per_token_estimates_add_up_to_that_of_the_response():
    policy, reference = response_logps(POLICY), response_logps(REFERENCE)
    truth = exact_kl(policy.sum(1), reference.sum(1))
    for name in ("k1", "k3"):
        mean = (policy.sum(1).exp() * kl_estimate(policy, reference, name).sum(1)).sum()
        torch.testing.assert_close(mean, truth)


def test_off_policy_no_estimator_is_right(logps):
    policy, reference = logps
    other = response_logps(table(3)).sum(1).detach()
    for name in KL_ESTIMATORS:
        mean = (other.exp() * kl_estimate(policy, reference, name)).sum()
        assert abs(mean - exact_kl(policy, reference)) > 0.05


def test_gradients_of_the_estimators_as_losses(logps):
    policy, reference = logps
    weights = policy.exp().detach()  # the responses are drawn; the draw has no gradient

    def as_loss(name):
        return gradient((weights * kl_estimate(policy, reference, name)).sum())

    forward, backward = gradient(exact_kl(policy, reference)), gradient(exact_kl(reference, policy))
    torch.testing.assert_close(as_loss("k1"), torch.zeros_like(forward), rtol=0, atol=1e-12)
    torch.testing.assert_close(as_loss("k2"), forward)
    torch.testing.assert_close(as_loss("k3"), backward)


def test_k1_in_the_reward_has_the_gradient_of_the_kl(logps):
    policy, reference = logps
    rewards = penalised_rewards(torch.zeros(9).double(), policy.detach(), reference, beta=0.7)
    loss = (policy.exp().detach() * reinforce_loss(policy, rewards)).sum()
    torch.testing.assert_close(gradient(loss), 0.7 * gradient(exact_kl(policy, reference)))


def test_the_trust_region_has_the_value_and_the_gradient_of_the_kl_to_the_iterate(logps):
    policy, iterate = logps
    found = (iterate.exp() * trust_region(policy, iterate)).sum()
    torch.testing.assert_close(found, exact_kl(policy, iterate))
    torch.testing.assert_close(gradient(found), gradient(exact_kl(policy, iterate)))
    naive = gradient((iterate.exp() * (policy - iterate)).sum())  # the mean log-ratio of the iterate's samples
    assert torch.cosine_similarity(naive, gradient(found), dim=0) < 0  # would drive the two apart


def test_mdpo_is_the_mean_advantage_of_the_policy_less_the_trust_region(logps):
    policy, iterate = logps
    advantages = torch.randn(9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    loss = (iterate.exp() * mdpo_loss(policy, iterate, advantages, gamma=0.4)).sum()
    expected = -(policy.exp() * advantages).sum() + 0.4 * exact_kl(policy, iterate)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss), gradient(expected))
