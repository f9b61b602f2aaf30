"""Packed weights: the model's own hidden states and logits, of every kind of layer; and those of now after a step."""

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.generation import packed as layout
from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import Sampler, sample
from lightning_llm.generation.packed import Packed, PackedLinear, TransposedLinear
from lightning_llm.models import ModelConfig, Transformer

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "qwen2": {"family": "qwen2"},
    "untied": {"family": "llama", "attention_bias": False, "tie_word_embeddings": False},
    "experts": {"family": "qwen2_moe", "shared_expert_intermediate_size": 24, **EXPERTS},
    "gemma2": {
        "family": "gemma2", "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh",
        "norms_add_one": True, "post_norms": True, "scale_embeddings": True, "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
    },
}  # fmt: skip


@pytest.fixture(autouse=True, params=[PackedLinear, TransposedLinear])
def kind_of_linear(monkeypatch, request):
    """What all products are: matrices of these models are small, and each kind takes any size."""
    monkeypatch.setattr(layout, "SMALLEST", 0 if request.param is PackedLinear else 2**20)
    return request.param


def build(**settings):
    config = ModelConfig(
        name="tiny", vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, **settings,
    )  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_packed_layers_are_the_models(kind, kind_of_linear):
    model = build(**kind)
    packed = Packed(model)
    assert packed.is_packed
    assert not any(type(module) is torch.nn.Linear for module in packed.body.modules())
    assert any(isinstance(module, kind_of_linear) for module in packed.body.modules())
    assert isinstance(packed.head, kind_of_linear)
    batch = SegmentBatch.from_documents([list(range(9)), [7, 7, 30], [1]])
    with torch.inference_mode():
        expected, found = model(batch), packed.body(batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed.logits(expected), model.logits(expected), rtol=1e-4, atol=1e-4)


def test_a_matrix_is_laid_out_by_its_size(monkeypatch):
    """Of this model the head alone is packed, the others are transposed; all are refreshed after a step of training."""
    model = build()
    monkeypatch.setattr(layout, "SMALLEST", model.head_weight.numel())
    packed = Packed(model)
    assert [module for module in packed.body.modules() if isinstance(module, PackedLinear)] == [packed.head]
    batch = SegmentBatch.from_documents([list(range(9)), [7, 7, 30], [1]])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert not torch.allclose(packed.body(batch), model(batch), rtol=1e-2)
        packed.refresh()
        torch.testing.assert_close(packed.body(batch), model(batch), rtol=1e-4, atol=1e-4)
        hidden = model(batch)
        torch.testing.assert_close(packed.logits(hidden), model.logits(hidden), rtol=1e-4, atol=1e-4)


def test_a_refreshed_sampler_is_a_new_one():
    """After a step of an optimizer, when all weights have moved."""
    model = build()
    sampler = Sampler(model)
    prompts = [[1, 2, 3], [4], [5, 6]]
    options = {"max_new_tokens": 8, "stop_ids": (), "samples": 4, "sampling": Sampling(1.0), "seed": 2}
    before = sampler.sample(prompts, **options)
    assert before == sample(model, prompts, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    hidden = model(SegmentBatch.from_documents(prompts))
    model.log_likelihood(hidden, torch.arange(6)).sum().backward()
    optimizer.step()
    sampler.refresh()
    after = sampler.sample(prompts, **options)
    assert after == sample(model, prompts, **options)
    assert [each.ids for each in after] != [each.ids for each in before]
