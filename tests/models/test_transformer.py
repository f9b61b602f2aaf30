"""The backbone's own promises: its norm, its initial weights, its types, and what it refuses."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import rms_norm

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.config import ACTIVATIONS, COUNTS, POSITIVE
from lightning_llm.models.feed_forward import FUNCTIONS
from lightning_llm.models.transformer import RMSNorm
from lightning_llm.settings import UserError


def tiny(**changes) -> ModelConfig:
    shape = dict(name="tiny", vocab_size=101, hidden_size=48, intermediate_size=71, num_hidden_layers=3)
    return ModelConfig(**{**shape, "num_attention_heads": 6, "num_key_value_heads": 2, **changes})


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """No parameter keeps a value, as a bias of 0, that would hide its being left out."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(9, 37), (9, 4, 37)], ids=["tokens", "heads"])
def test_norm_is_torchs_forward_and_backward(shape, offset):
    torch.manual_seed(0)
    norm, x = RMSNorm(37, 1e-5, offset), (torch.randn(shape) * 3).requires_grad_()
    torch.nn.init.normal_(norm.weight)
    exact, weight = (tensor.detach().double().requires_grad_() for tensor in (x, norm.weight))
    out, expected = norm(x), rms_norm(exact, (37,), offset + weight, 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


def test_weights_depend_on_the_seed_alone():
    first, second, third = (Transformer(tiny(vocab_size=5000)) for _ in range(3))
    first.reset_parameters(1)
    torch.manual_seed(7)
    second.reset_parameters(1)
    third.reset_parameters(2)
    for ours, same in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, same)
    assert not torch.equal(first.head_weight, third.head_weight)
    assert first.head_weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert first.layers[0].self_attn.qkv_proj.bias.abs().max() == 0
    assert first.norm.weight.min() == first.norm.weight.max() == 1


def test_norms_that_add_one_begin_as_the_identity_of_others():
    shape = dict(family="gemma2", attention_bias=False, post_norms=True, norms_add_one=True, scale_embeddings=True)
    model = Transformer(tiny(**shape))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    model.reset_parameters(0)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 4 * 3 + 1
    x = torch.randn(5, 48)
    for norm in norms:
        torch.testing.assert_close(norm(x), rms_norm(x, (48,), eps=1e-6))


def test_half_precision_products_keep_float32_weights_and_residuals():
    model, batch = random_model(tiny()), SegmentBatch.from_groups([[1, 2, 3]], [[[4, 5], [6]]])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(batch)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, model(batch), rtol=0.1, atol=0.1)
    hidden.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.layers.parameters())


def test_every_activation_has_its_function():
    assert tuple(FUNCTIONS) == ACTIVATIONS


def test_what_is_not_built_is_refused_before_it_is_trained():
    with pytest.raises(UserError, match="'mamba' is not built yet"):
        Transformer(tiny(family="mamba"))
    with pytest.raises(UserError, match="attention_bias: is False, but Qwen2ForCausalLM always has True"):
        Transformer(tiny(attention_bias=False))
    with pytest.raises(UserError, match="qk_norm: is True, but LlamaForCausalLM always has False"):
        Transformer(tiny(family="llama", attention_bias=False, qk_norm=True))
    with pytest.raises(UserError, match="hidden_size: 48 is no multiple of num_attention_heads"):
        Transformer(
            tiny(family="llama", attention_bias=False, num_attention_heads=5, num_key_value_heads=1, head_dim=4)
        )


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (dict(num_key_value_heads=4), r"num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)"),
        (dict(hidden_size=50), "hidden_size"),
        (dict(hidden_size=54), "head size"),
        *((dict([(name, 0)]), f"{name} must be at least 1, got 0") for name in COUNTS),
        *((dict([(name, -1)]), f"{name} must be above 0, got -1") for name in POSITIVE),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps must be above 0"),
        (dict(hidden_act="gelu"), "hidden_act must be silu or gelu_pytorch_tanh, got gelu"),
        (dict(sliding_window=8), "sliding_window is 8, and no layer uses it: name sliding_attention in layer_types"),
        (dict(layer_types=["sliding_attention"]), "sliding_window must have a value"),
        (dict(layer_types=["linear_attention"]), "layer_types must be a list of sliding_attention and full_attention"),
        (dict(attn_logit_softcapping=0.0), "attn_logit_softcapping must be above 0, got 0.0"),
        (dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "'longrope' is not built yet; built are"),
        (dict(rope_parameters=YARN), "rope_parameters.original_max_position_embeddings has no value"),
        (dict(rope_parameters={"rope_theta": 1e4, "factor": 2.0}), "factor means nothing to rope_type default"),
        (dict(rope_parameters={"rope_theta": "large"}), "rope_theta must be a positive number, got 'large'"),
    ],
)
def test_impossible_shapes_are_refused_by_name(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny(**shape)


def test_transformers_modelling_code_is_never_imported(tmp_path):
    random_model(tiny()).save_pretrained(tmp_path)
    program = f"""
import sys
from lightning_llm.batch import SegmentBatch
from lightning_llm.generation.engine import generate
from lightning_llm.models import Transformer
model = Transformer.from_pretrained({str(tmp_path)!r})
model(SegmentBatch.from_documents([[1, 2, 3]]))
generate(model, [[1, 2]], max_new_tokens=2, stop_ids=[])
model.save_pretrained({str(tmp_path)!r})
print([name for name in sys.modules if name.split(".")[0] == "transformers"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
