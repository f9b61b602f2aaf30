"""Reward modelling: scores of the responses to a prompt, from which of them people preferred and by how much."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import GRADED
from lightning_llm.losses.reward import (
    bradley_terry_loss,
    grading_loss,
    margins,
    preference_probabilities,
    ranked_loss,
    soft_label_loss,
)
from lightning_llm.models import Transformer
from lightning_llm.models.reward import RewardModel
from lightning_llm.objectives.base import Objective
from lightning_llm.objectives.config import RewardModelConfig
from lightning_llm.optimization.window import LossSum


class RewardModelling(Objective):
    """One unit is one prompt with its responses: chosen, rejected, and perhaps an edited one that is better than both.

    Columns of the batch: `strength` [S] at each prompt, `grades` [S, C] at each response (`data/packing.py`).
    """

    unit = "pairs"
    config: RewardModelConfig
    model: RewardModel

    def __init__(self, config: RewardModelConfig, policy: Transformer, seed: int = 0):
        has_heads = isinstance(policy, RewardModel) and list(policy.grading) == config.graded
        super().__init__(config, policy if has_heads else RewardModel.from_backbone(policy, seed, config.graded))

    def loss(self, batch: SegmentBatch) -> LossSum:
        """The comparisons' losses, summed over prompts, with the grades' own if they have a weight."""
        read = self.model.read(batch)  # [S, d]
        scores = self.model.score(read).squeeze(-1)  # [S]
        prompts, chosen, rejected, edited = responses_in_order(batch)
        best, worst = scores[chosen], scores[rejected]
        losses = self.pair_losses(best, worst, batch.columns["strength"][prompts])  # [P]
        if has_edited := (edited >= 0).nonzero().squeeze(1).tolist():
            pair, better = losses[has_edited], scores[edited[has_edited]]
            above = ranked_loss(better, best[has_edited], worst[has_edited])
            # of its three pairs the one of chosen and rejected is the configured loss
            plain = bradley_terry_loss(best[has_edited], worst[has_edited])
            losses = losses.index_copy(0, torch.tensor(has_edited, device=losses.device), above + (pair - plain) / 3)
        count = len(prompts)
        metrics = {
            "rewards/chosen": (best.detach().sum(), count),
            "rewards/rejected": (worst.detach().sum(), count),
            "rewards/margins": ((best - worst).detach().sum(), count),
            "rewards/accuracies": ((best > worst).sum(), count),
        }
        if self.config.centre_weight:
            losses = losses + self.config.centre_weight * (best + worst).square()
        total = losses.sum()
        if self.config.graded:
            cost, right, graded = self.grade(batch, read)
            total = total + self.config.grading_weight * cost
            metrics |= {"grading/loss": (cost.detach(), graded), "grading/accuracy": (right, graded)}
        return LossSum(total, count, metrics)

    def pair_losses(self, chosen: Tensor, rejected: Tensor, strength: Tensor) -> Tensor:
        """Loss of each pair [P] from its scores and the strength of the preference."""
        if self.config.loss == "soft_labels":
            return soft_label_loss(chosen, rejected, preference_probabilities(strength))
        table = self.config.margins
        return bradley_terry_loss(chosen, rejected, None if table is None else margins(strength, table))

    def grade(self, batch: SegmentBatch, read: Tensor) -> tuple[Tensor, Tensor, int]:
        """Loss of all grades of all responses (in sum), how many the heads get right, and how many there are."""
        grades = batch.columns["grades"][:, [GRADED.index(name) for name in self.config.graded]]  # [S, C]
        logits = torch.stack([self.model.grading[name](read) for name in self.config.graded], dim=1)  # [S, C, 3]
        given = grades >= 0
        right = ((logits.argmax(-1) == grades) & given).sum()
        return grading_loss(logits, grades).sum(), right, int(given.sum())


def responses_in_order(batch: SegmentBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segments of each prompt, of its chosen, its rejected and its edited response, each [P]; -1: it has no edited one.

    Raises:
        ValueError: a prompt has neither two nor three responses.
    """
    by_prompt: dict[int, list[int]] = {}
    for segment, prefix in enumerate(batch.prefixes):
        if prefix >= 0:
            by_prompt.setdefault(prefix, []).append(segment)
    rows = []
    for prompt, responses in by_prompt.items():
        if len(responses) not in (2, 3):
            raise ValueError(f"a ranking is of two or three responses; segment {prompt} has {len(responses)}")
        rows.append([prompt, *responses, *[-1] * (3 - len(responses))])
    index = torch.tensor(rows, dtype=torch.int64, device=batch.input_ids.device).view(-1, 4)
    prompts, chosen, rejected, edited = index.unbind(1)
    return prompts, chosen, rejected, edited
