"""Next-token prediction: pre-training, its continuation, and supervised fine-tuning."""

from __future__ import annotations

from lightning_llm.batch import SegmentBatch
from lightning_llm.losses.causal_lm import causal_lm_loss
from lightning_llm.objectives.base import Objective
from lightning_llm.optimization.window import LossSum


class CausalLM(Objective):
    """One unit is one target token that is not masked."""

    def loss(self, batch: SegmentBatch) -> LossSum:
        """Negative log-likelihood in nats, summed over the batch's target tokens."""
        hidden = self.model(batch)  # [T, d]
        loss = causal_lm_loss(
            hidden[batch.predictors],
            self.model.head_weight,
            batch.target_ids,
            batch.target_mask,
            softcap=self.model.config.final_logit_softcapping,
        )
        return LossSum(loss, count=sum(batch.target_counts))
