"""Next-token prediction with masks over hidden units that are learnt meanwhile: what can be pruned afterwards."""

from __future__ import annotations

import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.packing import Window
from lightning_llm.losses.soft_top_k import annealed_budget, annealed_temperature
from lightning_llm.models import Transformer
from lightning_llm.models.masked import MaskedTransformer
from lightning_llm.objectives.causal_lm import CausalLM
from lightning_llm.objectives.config import PruningMasksConfig
from lightning_llm.optimization.window import LossSum


class PruningMasks(CausalLM):
    """One unit is one target token that is not masked. What is saved is the masked model, with the scores beside it."""

    config: PruningMasksConfig
    model: MaskedTransformer

    def __init__(self, config: PruningMasksConfig, backbone: Transformer, seed: int = 0):
        super().__init__(config, MaskedTransformer.from_backbone(backbone, seed))
        if not config.train_weights:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name.startswith("mask_scores."))

    def training_step(self, window: Window, index: int) -> None:
        """As every objective's, with the budget and the temperature of this place in the stage."""
        self.anneal(window.progress.tokens / self.total_tokens)
        super().training_step(window, index)

    def anneal(self, progress: float) -> None:
        """Set the masks' budget and temperature after a share of the stage."""
        config, model = self.config, self.model
        units = model.config.intermediate_size
        model.budget = annealed_budget(progress, units, config.intermediate_size, config.budget_ramp)
        model.temperature = annealed_temperature(progress, config.temperature, config.final_temperature)

    def loss(self, batch: SegmentBatch) -> LossSum:
        """As `CausalLM.loss`; logs `masks/budget` and `masks/hardness`, sum m^2 / sum m: 1 if all masks are 0 or 1."""
        part = super().loss(batch)
        masks = torch.stack([each.mask.detach() for each in self.model.feed_forwards if each.mask is not None])
        part.metrics = {
            "masks/budget": (masks.sum(1).mean() * part.count, part.count),
            "masks/hardness": (masks.square().sum() / masks.sum() * part.count, part.count),
        }
        return part
