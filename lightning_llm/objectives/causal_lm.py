"""Next-token prediction: pre-training, its continuation, and supervised fine-tuning."""

from __future__ import annotations

from lightning_llm.batch import SegmentBatch
from lightning_llm.objectives.base import Objective
from lightning_llm.optimization.window import LossSum


class CausalLM(Objective):
    """One unit is one target token that is not masked."""

    def loss(self, batch: SegmentBatch) -> LossSum:
        """Negative log-likelihood in nats, summed over the batch's target tokens."""
        hidden = self.model(batch)  # [T, d]
        logps = self.model.log_likelihood(
            hidden[batch.predictors],
            batch.target_ids,
            token_weights=batch.target_mask.float(),  # gradients are made on the way: the cheap mode
        )  # [N]
        return LossSum(-logps.sum(), count=sum(batch.target_counts))
