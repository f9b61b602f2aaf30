"""Preference optimisation on pairs that share their prompt: policy against a frozen reference, by DPO or by IPO."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.losses.preference import chosen_nll, dpo_loss, formatting_mask, ipo_loss
from lightning_llm.models import Transformer
from lightning_llm.objectives.base import Objective, token_logps
from lightning_llm.objectives.config import DPOConfig, IPOConfig, PreferenceConfig
from lightning_llm.optimization.window import LossSum

Pair = tuple[Tensor, Tensor]  # chosen [P], rejected [P]


class Preference(Objective):
    """One unit is one pair. Needs the column `reference_logps` [N], or a reference model to compute it from."""

    unit = "pairs"
    config: PreferenceConfig

    def __init__(
        self,
        config: PreferenceConfig,
        policy: Transformer,
        reference: Transformer | None = None,
        formatting_ids: Iterable[int] = (),
    ):
        super().__init__(config, policy)
        self.reference = self.frozen(reference)
        self.formatting_ids = sorted(formatting_ids) if config.mask_formatting else []

    def pair_losses(self, policy: Pair, reference: Pair) -> Tensor:
        """Loss of each pair [P] from sequence log-probabilities in nats."""
        raise NotImplementedError

    def loss(self, batch: SegmentBatch) -> LossSum:
        """`pair_losses`, summed over the pairs, with the chosen responses' own likelihood beside if it has a weight.

        Segments of the batch are prompts, each with its chosen and its rejected response.
        """
        logps = token_logps(self.model, batch)  # [N]
        content = None  # [N], what the two log-ratios are taken over; None: every target
        if self.formatting_ids:
            content = ~formatting_mask(batch.target_ids, self.formatting_ids)
        policy = batch.pairs(batch.sum_by_segment(logps, content))
        reference = batch.pairs(batch.sum_by_segment(self.reference_logps(batch), content))
        losses = self.pair_losses(policy, reference)  # [P]
        count = losses.numel()
        metrics = self.metrics(policy, reference)
        if self.config.nll_weight:  # Llama 3, section 4.1.4: over the whole chosen response, formatting too
            chosen_logps, _ = batch.pairs(batch.sum_by_segment(logps))
            lengths, _ = batch.pairs(torch.tensor(batch.target_counts, device=logps.device))
            nll = chosen_nll(chosen_logps, lengths)  # [P]
            losses = losses + self.config.nll_weight * nll
            metrics["nll/chosen"] = nll.detach().sum()
        return LossSum(losses.sum(), count, {name: (total, count) for name, total in metrics.items()})

    def reference_logps(self, batch: SegmentBatch) -> Tensor:
        """Log-probability of every target under the reference, in nats [N]."""
        if self.reference is None:
            return batch.columns["reference_logps"]
        with torch.no_grad():
            return token_logps(self.reference.on(self.device), batch)

    @torch.no_grad()
    def metrics(self, policy: Pair, reference: Pair) -> dict[str, Tensor]:
        """Sums over the pairs, under the names that TRL's dashboards know."""
        chosen, rejected = (self.config.beta * (p - r) for p, r in zip(policy, reference, strict=True))
        return {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "logps/chosen": policy[0].sum(),
            "logps/rejected": policy[1].sum(),
        }


class DPO(Preference):
    """Direct preference optimisation, with Llama 3's two additions: formatting masked, NLL on the chosen response."""

    config: DPOConfig

    def pair_losses(self, policy: Pair, reference: Pair) -> Tensor:
        """[P] (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""
        config = self.config
        return dpo_loss(*policy, *reference, beta=config.beta, label_smoothing=config.label_smoothing)


class IPO(Preference):
    """Identity preference optimisation: the margin is drawn towards 1 / (2 beta) instead of to infinity."""

    config: IPOConfig

    def pair_losses(self, policy: Pair, reference: Pair) -> Tensor:
        """[P] (Azar et al. 2023, arXiv 2310.12036, equation 17)."""
        return ipo_loss(*policy, *reference, beta=self.config.beta)
