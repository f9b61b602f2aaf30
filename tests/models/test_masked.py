"""Masks that are learnt: what they do to a model, what of them is kept, and that gradients reach their scores."""

import dataclasses

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.losses.soft_top_k import soft_top_k
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.masked import MaskedTransformer, read_scores

CONFIG = ModelConfig(
    name="tiny", vocab_size=41, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
BATCH = SegmentBatch.from_documents([[1, 2, 3, 4, 5], [6, 7, 8]])


@pytest.fixture
def backbone():
    model = Transformer(CONFIG)
    model.reset_parameters(0)
    return model


def test_with_the_whole_budget_it_is_the_backbone(backbone):
    model = MaskedTransformer.from_backbone(backbone, seed=1)
    assert torch.equal(model.masks(), torch.ones(2, 20))
    torch.testing.assert_close(model(BATCH), backbone(BATCH))
    assert next(model.parameters()) is next(backbone.parameters())  # nothing is copied


def test_it_multiplies_hidden_units_and_folds_into_a_plain_model(backbone):
    model = MaskedTransformer.from_backbone(backbone, seed=1)
    model.budget, model.temperature = 7.0, 0.3
    masks = model.masks()
    torch.testing.assert_close(masks.sum(1), torch.full((2,), 7.0))
    z = model.mask_scores[1].detach()
    torch.testing.assert_close(masks[1], soft_top_k(z / z.std(), 7.0, 0.3))
    found = model(BATCH)
    torch.testing.assert_close(model.folded()(BATCH), found)
    for layer, mask in zip(backbone.layers, masks, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given, mask=mask: (given[0] * mask,))
    torch.testing.assert_close(backbone(BATCH), found)


def test_the_scale_of_scores_means_nothing(backbone):
    model = MaskedTransformer.from_backbone(backbone, seed=1)
    model.budget, model.temperature = 7.0, 0.3
    before = model.masks()
    with torch.no_grad():
        for z in model.mask_scores:
            z.mul_(50).add_(3)
    torch.testing.assert_close(model.masks(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_scores_learn_which_units_are_needed(backbone, again):
    """With the weights as they are, a few steps find masks that cost less than random ones of the same budget."""
    model = MaskedTransformer.from_backbone(backbone.requires_grad_(False), seed=1)
    model.activation_checkpointing = again  # layers run once more backwards, with the masks of their pass
    model.budget, model.temperature = 8.0, 0.3
    with torch.no_grad():
        target = backbone(BATCH)
    optimizer = torch.optim.Adam(model.mask_scores.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(BATCH) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(z.grad.isfinite().all() and z.grad.any() for z in model.mask_scores)


def test_what_is_saved_is_the_masked_model_with_its_scores(backbone, tmp_path):
    import transformers

    transformers.logging.disable_progress_bar()
    model = MaskedTransformer.from_backbone(backbone, seed=1)
    model.budget, model.temperature = 7.0, 0.3
    model.save_pretrained(tmp_path / "masked", eos_token_ids=[0])
    back = Transformer.from_pretrained(tmp_path / "masked")
    torch.testing.assert_close(back(BATCH), model(BATCH))
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "masked", attn_implementation="eager")
    expected = torch.cat([theirs(ids[None]).logits[0] for ids in BATCH.input_ids.split(BATCH.lengths)])
    torch.testing.assert_close(back.logits(back(BATCH)), expected, rtol=1e-4, atol=1e-4)
    scores = read_scores(tmp_path / "masked")
    assert torch.equal(scores, torch.stack([z.detach() for z in model.mask_scores]))
    backbone.save_pretrained(tmp_path / "plain")
    assert read_scores(tmp_path / "plain") is None


def test_a_mixture_has_no_masks():
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
    config = dataclasses.replace(CONFIG, family="qwen2_moe", shared_expert_intermediate_size=4, **experts)
    with pytest.raises(ValueError, match="num_experts is 2, and only dense models are masked"):
        MaskedTransformer.from_backbone(Transformer(config), seed=0)
