"""Policy gradients: rewards become advantages, and these with log-probabilities losses. Nothing is averaged here.

A whole response is one action, or each of its tokens is one, as the method says. P prompts have G responses each; N is
any number of actions. Log-probabilities are in nats; `iterate` is the policy that the responses were drawn from.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PerGroup: TypeAlias = Float[Tensor, "prompts responses"]
PerAction: TypeAlias = Float[Tensor, "actions"]

LARGEST_LOG_RATIO = 20.0  # e^20: keeps a ratio finite in float32, and nothing beyond it has a gradient


# ---- rewards and advantages ----


def penalised_rewards(rewards: Tensor, iterate_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """Rewards less the KL to a reference, as one sample of it tells (AFM's report, section on RLHF, eq. 1).

    R = r - beta (log iterate - log reference), which is k1 of `kl_estimate` in the reward: through a policy gradient
    its mean has the gradient of -beta KL(policy || reference).

    Args:
        rewards, iterate_logps, reference_logps: of whole responses, any one shape; none has a gradient.
        beta: >= 0.
    """
    return rewards - beta * (iterate_logps - reference_logps)


def leave_one_out(rewards: PerGroup) -> PerGroup:
    """Each reward less the mean of the other responses' to its prompt (Kool et al. 2019; Ahmadian et al. 2024, eq. 8).

    A_i = R_i - 1/(G-1) sum_{j != i} R_j. The baseline knows nothing of response i, so the gradient is unbiased; the
    advantages of a prompt add up to 0.

    Raises:
        ValueError: fewer than two responses to a prompt.
    """
    count = _several(rewards)
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (count / (count - 1))


def group_normalised(rewards: PerGroup, *, epsilon: float = 1e-4) -> PerGroup:
    """Rewards less their prompt's mean, in units of its standard deviation (GRPO; Shao et al. 2024, section 4.1.2).

    The mean holds response i itself and the scale depends on the draw, so the gradient is not that of the mean reward:
    prompts that are nearly solved or nearly hopeless count for more. Equal rewards have no advantage.

    Args:
        epsilon: added to the deviation (of the sample, with G - 1).

    Raises:
        ValueError: fewer than two responses to a prompt.
    """
    _several(rewards)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + epsilon)


def _several(rewards: PerGroup) -> int:
    if rewards.shape[1] < 2:
        raise ValueError(f"a prompt needs two responses or more to compare, has {rewards.shape[1]}")
    return rewards.shape[1]


# ---- losses ----


def reinforce_loss(logps: PerAction, advantages: PerAction) -> PerAction:
    """-A log policy of each action (Williams 1992); with `leave_one_out` this is REINFORCE-LOO."""
    return -advantages.detach() * logps


def mdpo_loss(logps: PerAction, iterate_logps: PerAction, advantages: PerAction, *, gamma: float) -> PerAction:
    """One step of mirror descent towards the advantage, held near the iterate (Tomar et al. 2020, arXiv 2005.09814).

    With rho = policy / iterate of a whole response, drawn from the iterate:
        loss = -rho A + gamma (rho log rho - rho + 1)
    Its mean is -E_policy[A] + gamma KL(policy || iterate), and so is its gradient. At policy = iterate that of the
    second term is 0, and the first step is REINFORCE's. AFM's MDLOO has leave-one-out advantages in it.

    Args:
        logps, iterate_logps: of whole responses; the latter without gradient.
        gamma: >= 0; 1 / the step size of the mirror descent.

    Raises:
        ValueError: gamma is negative.
    """
    if gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    log_ratio = _log_ratio(logps, iterate_logps)
    return -log_ratio.exp() * advantages.detach() + gamma * trust_region(logps, iterate_logps)


def trust_region(logps: Tensor, iterate_logps: Tensor) -> Tensor:
    """rho log rho - rho + 1 of each action that was drawn from the iterate: never negative, in the mean
    KL(policy || iterate), and so is its gradient.

    Not log rho: its mean under the iterate is -KL(iterate || policy), and to make that small drives the two apart.
    """
    log_ratio = _log_ratio(logps, iterate_logps)
    return log_ratio.exp() * log_ratio - log_ratio.expm1()


def ppo_clip_loss(
    token_logps: PerAction,
    old_token_logps: PerAction,
    advantages: PerAction,
    mask: Bool[Tensor, "actions"],
    *,
    clip_low: float,
    clip_high: float,
) -> PerAction:
    """Clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), with the two sides apart as in DAPO (Yu et al.
    2025, arXiv 2503.14476, eq. 10).

    With rho = policy / old policy of an action:
        loss = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)

    Args:
        token_logps, old_token_logps: of tokens, or of whole responses where those are the actions.
        advantages: of each action; a response's own at each of its tokens.
        mask: which actions count; the others have loss 0.
        clip_low, clip_high: > 0, the former at most 1. PPO: both 0.2; DAPO: 0.2 and 0.28.

    Raises:
        ValueError: a bound is out of range.
    """
    if not 0 < clip_low <= 1 or clip_high <= 0:
        raise ValueError(f"clip_low lies in (0, 1] and clip_high above 0, got {clip_low} and {clip_high}")
    ratio = _log_ratio(token_logps, old_token_logps).exp()
    advantages = advantages.detach()
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return losses.where(mask, losses.new_zeros(()))


def _log_ratio(logps: Tensor, iterate_logps: Tensor) -> Tensor:
    return (logps - iterate_logps.detach()).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


# ---- the divergence of two policies, from samples of the first ----

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logps: Tensor, reference_logps: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) as each action tells it that was drawn from the policy (Schulman 2020, "Approximating KL
    divergence").

    With l = log reference - log policy:
        k1 = -l             unbiased, may be negative
        k2 = l^2 / 2        biased, low variance
        k3 = e^l - 1 - l    unbiased, never negative

    Made small directly, as a loss: k1 does nothing in the mean, k2 of whole responses has the gradient of
    KL(policy || reference), k3 that of KL(reference || policy).

    Args:
        logps, reference_logps: any one shape.
        estimator: one of `KL_ESTIMATORS`.

    Raises:
        ValueError: it is none of them.
    """
    log_ratio = reference_logps - logps
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.clamp(max=LARGEST_LOG_RATIO).expm1() - log_ratio
    raise ValueError(f"estimator is one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}")
