"""Policy gradients on responses that the policy has drawn itself: mirror descent, and what it is compared with.

A batch is prompts with G responses each. Its columns are `sampled_logps` [N] and `reference_logps` [N] of every target
under the policy that drew the responses and under the reference, and `rewards` [S].
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.losses.policy import (
    group_normalised,
    kl_estimate,
    leave_one_out,
    mdpo_loss,
    penalised_rewards,
    ppo_clip_loss,
    reinforce_loss,
    trust_region,
)
from lightning_llm.objectives.base import Objective, token_logps
from lightning_llm.objectives.config import (
    ClippedConfig,
    DAPOConfig,
    GRPOConfig,
    MDPOConfig,
    PolicyConfig,
    PPOConfig,
    RLOOConfig,
)
from lightning_llm.optimization.window import LossSum

Metrics = dict[str, tuple[Tensor, int]]  # name -> (sum, what it is a sum over)


class PolicyGradient(Objective):
    """One unit is one response. A subclass says what advantages are, and what the responses of a batch cost in sum."""

    unit = "responses"
    config: PolicyConfig

    def advantages(self, batch: SegmentBatch) -> Tensor:
        """[P, G]: leave-one-out, of rewards less the KL to the reference."""
        return leave_one_out(self.penalised(batch))

    def penalised(self, batch: SegmentBatch) -> Tensor:
        """Rewards [P, G], less `beta` times each response's log-ratio of iterate and reference."""
        rewards, beta = batch.groups(batch.columns["rewards"]), self.config.beta
        if not beta:
            return rewards
        sampled, reference = (
            batch.groups(batch.sum_by_segment(batch.columns[name])) for name in ("sampled_logps", "reference_logps")
        )
        return penalised_rewards(rewards, sampled, reference, beta=beta)

    def policy_loss(self, batch: SegmentBatch, logps: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """The summed loss [] of `logps` [N] and `advantages` [P, G], and what else is logged."""
        raise NotImplementedError

    def loss(self, batch: SegmentBatch) -> LossSum:
        """`policy_loss` of the policy as it is now, and what only the objective knows of it.

        What was drawn is told once, beside the batch: `reward/mean`, `kl/reference` and `entropy` are figures of the
        window (`training/rollout.py:figures`).
        """
        logps = token_logps(self.model, batch)  # [N]
        advantages = self.advantages(batch) if any(batch.target_counts) else logps.new_zeros(0, 1)  # [P, G]
        loss, metrics = self.policy_loss(batch, logps, advantages)
        count = advantages.numel() if self.unit == "responses" else sum(batch.target_counts)
        return LossSum(loss, count, self.metrics(batch, logps.detach(), advantages) | metrics)

    @torch.no_grad()
    def metrics(self, batch: SegmentBatch, logps: Tensor, advantages: Tensor) -> Metrics:
        """Sums over responses for `kl/iterate`, over prompts for the others."""
        sampled, responses = batch.columns["sampled_logps"], advantages.numel()
        if not responses:
            return {}
        rewards = batch.groups(batch.columns["rewards"])
        return {
            "reward/std": (rewards.std(dim=1).sum(), rewards.shape[0]),
            "advantages/unequal": ((advantages != 0).any(dim=1).sum(), rewards.shape[0]),
            "kl/iterate": (trust_region(*self._by_response(batch, logps, sampled)).sum(), responses),
        }

    @staticmethod
    def _by_response(batch: SegmentBatch, *token_values: Tensor) -> list[Tensor]:
        """Sums over each response [P * G] of values per target [N]."""
        return [batch.groups(batch.sum_by_segment(values)).flatten() for values in token_values]


class RLOO(PolicyGradient):
    """REINFORCE with leave-one-out advantages: a whole response is one action (Ahmadian et al. 2024)."""

    config: RLOOConfig

    def policy_loss(self, batch: SegmentBatch, logps: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """Minus advantage times log-probability, summed over the responses."""
        (policy,) = self._by_response(batch, logps)
        return reinforce_loss(policy, advantages.flatten()).sum(), {}


class MDPO(PolicyGradient):
    """Mirror descent: the policy goes where the advantage is and stays near the iterate that drew the responses."""

    config: MDPOConfig

    def policy_loss(self, batch: SegmentBatch, logps: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """`mdpo_loss` of whole responses; their trust region by whole responses too, or token by token."""
        sampled, gamma = batch.columns["sampled_logps"], self.config.gamma
        policy, iterate = self._by_response(batch, logps, sampled)
        if self.config.trust_region == "sequence":
            return mdpo_loss(policy, iterate, advantages.flatten(), gamma=gamma).sum(), {}
        surrogate = mdpo_loss(policy, iterate, advantages.flatten(), gamma=0.0).sum()
        return surrogate + gamma * batch.sum_by_segment(trust_region(logps, sampled)).sum(), {}


class Clipped(PolicyGradient):
    """What PPO and its kin share."""

    config: ClippedConfig

    def clipped(self, logps: Tensor, sampled: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
        """Losses of the actions that `mask` selects, and the share of them whose ratio lies outside the bounds."""
        low, high = self.config.clip_low, self.config.clip_high
        losses = ppo_clip_loss(logps, sampled, advantages, mask, clip_low=low, clip_high=high)
        ratio = (logps.detach() - sampled).exp()
        outside = ((ratio < 1 - low) | (ratio > 1 + high)) & mask
        return losses, {"ratio/clipped": (outside.sum(), int(mask.sum()))}

    def clipped_tokens(self, batch: SegmentBatch, logps: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """The same of every token [N], with its response's advantage."""
        sampled = batch.columns["sampled_logps"]
        return self.clipped(logps, sampled, batch.to_targets(advantages), batch.target_mask)


class PPO(Clipped):
    """The clipped surrogate, summed over a response's tokens or of its whole ratio, without a critic."""

    config: PPOConfig

    def policy_loss(self, batch: SegmentBatch, logps: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """Summed over tokens and responses: at the iterate its gradient is REINFORCE's."""
        if self.config.ratio == "token":
            losses, metrics = self.clipped_tokens(batch, logps, advantages)
            return losses.sum(), metrics
        policy, iterate = self._by_response(batch, logps, batch.columns["sampled_logps"])
        everyone = torch.ones_like(policy, dtype=torch.bool)
        losses, metrics = self.clipped(policy, iterate, advantages.flatten(), everyone)
        return losses.sum(), metrics


class GRPO(Clipped):
    """Rewards in units of their prompt's deviation, each response's tokens averaged, the KL in the loss (arXiv
    2402.03300, equation 3)."""

    config: GRPOConfig

    def advantages(self, batch: SegmentBatch) -> Tensor:
        """[P, G]: rewards less their prompt's mean, over its deviation; the KL is no part of them."""
        return group_normalised(batch.groups(batch.columns["rewards"]))

    def policy_loss(self, batch: SegmentBatch, logps: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """The mean over each response's tokens, summed over the responses."""
        losses, metrics = self.clipped_tokens(batch, logps, advantages)
        if self.config.beta:
            divergence = kl_estimate(logps, batch.columns["reference_logps"], self.config.kl_estimator)
            losses = losses + self.config.beta * divergence
        lengths = torch.tensor(batch.target_counts, device=logps.device).clamp(min=1)
        return (batch.sum_by_segment(losses) / lengths).sum(), metrics


class DAPO(Clipped):
    """GRPO without KL, clipped further above than below; one unit is one token, so that long responses count by their
    length (arXiv 2503.14476, equation 8)."""

    unit = "target_tokens"
    config: DAPOConfig

    def advantages(self, batch: SegmentBatch) -> Tensor:
        """[P, G]: as GRPO's, of rewards less the KL to the reference, if that has a weight."""
        return group_normalised(self.penalised(batch))

    def policy_loss(self, batch: SegmentBatch, logps: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """Summed over all tokens."""
        losses, metrics = self.clipped_tokens(batch, logps, advantages)
        return losses.sum(), metrics
