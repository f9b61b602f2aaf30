"""Learning masks: the loss is the masked model's, budget and temperature follow the stage, frozen weights stay."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_llm.batch import SegmentBatch
from lightning_llm.losses.soft_top_k import soft_top_k
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.objectives.config import PruningMasksConfig

BATCH = SegmentBatch.from_documents([[1, 2, 3, 4, 5], [6, 7, 8]])


@pytest.fixture
def backbone():
    sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    config = ModelConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    model = Transformer(config)
    model.reset_parameters(1)
    return model


def test_the_loss_is_that_of_the_masked_model(backbone):
    objective = PruningMasksConfig(intermediate_size=8).build(backbone, seed=3)
    objective.anneal(1.0)
    part = objective.loss(BATCH)
    masks = [soft_top_k(z / z.std(), 8, 0.1).detach() for z in objective.model.mask_scores]
    for layer, mask in zip(backbone.layers, masks, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given, mask=mask: (given[0] * mask,))
    logits = backbone.logits(backbone(BATCH))[BATCH.predictors]
    torch.testing.assert_close(part.loss, cross_entropy(logits, BATCH.target_ids, reduction="sum"))
    figures = {name: total.item() / count for name, (total, count) in part.metrics.items()}
    flat = torch.cat(masks)
    assert figures["masks/budget"] == pytest.approx(8, rel=1e-5)
    assert figures["masks/hardness"] == pytest.approx((flat.square().sum() / flat.sum()).item(), rel=1e-5)


def test_budget_and_temperature_follow_the_stage(backbone):
    config = PruningMasksConfig(intermediate_size=8, temperature=2.0, final_temperature=0.02, budget_ramp=0.4)
    objective = config.build(backbone)
    expected = {0.0: (32.0, 2.0), 0.2: (20.0, 2.0 * 0.01**0.2), 0.4: (8.0, 2.0 * 0.01**0.4), 0.5: (8.0, 0.2)}
    for progress, figures in (expected | {1.0: (8.0, 0.02)}).items():
        objective.anneal(progress)
        assert (objective.model.budget, objective.model.temperature) == pytest.approx(figures)
    at_once = PruningMasksConfig(intermediate_size=8, budget_ramp=0.0).build(backbone)
    at_once.anneal(0.0)
    assert at_once.model.budget == 8


@pytest.mark.parametrize("trained", [True, False])
def test_weights_learn_or_stay(backbone, trained):
    objective = PruningMasksConfig(intermediate_size=8, train_weights=trained).build(backbone)
    objective.anneal(0.5)
    objective.loss(BATCH).loss.backward()
    model = objective.model
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    everything = {name for name, _ in model.named_parameters()}
    assert with_gradient == (everything if trained else {name for name in everything if "mask_scores" in name})


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.0), ("final_temperature", float("inf")), ("budget_ramp", 1.5)]
)
def test_figures_that_are_none_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} "):
        PruningMasksConfig(intermediate_size=8, **{field: value})
