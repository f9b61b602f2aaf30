"""The backbone against transformers' Qwen2, through files in both directions, and against itself packed otherwise."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.transformer import RMSNorm
from lightning_llm.settings import UserError

SHAPES = {
    "grouped, untied": dict(num_attention_heads=6, num_key_value_heads=2),
    "grouped, tied": dict(num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True),
    "one head of keys, large base": dict(
        num_attention_heads=4,
        num_key_value_heads=1,
        hidden_size=40,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "heads of their own size": dict(
        num_attention_heads=3, num_key_value_heads=3, hidden_size=20, head_dim=14, tie_word_embeddings=True
    ),
}


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


def documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 101, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def peer():
    from transformers import Qwen2ForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Qwen2ForCausalLM


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_one_training_step_equal_transformers_through_files(shape, peer, tmp_path):
    model = random_model(tiny(**shape))
    model.save_pretrained(tmp_path / "ours", eos_token_ids=[5, 6])
    theirs = peer.from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager")
    batch = SegmentBatch.from_documents(documents(13, 1, 29, 7))
    segments = [batch.input_ids[a:b] for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]

    def expected_logits() -> torch.Tensor:
        return torch.cat([theirs(segment[None]).logits[0] for segment in segments])

    torch.testing.assert_close(model.logits(model(batch)), expected_logits(), rtol=1e-4, atol=1e-4)

    for parameters, logits in (
        (model.parameters(), model.logits(model(batch))),
        (theirs.parameters(), expected_logits()),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        cross_entropy(logits[batch.predictors], batch.target_ids).backward()
        optimizer.step()
    torch.testing.assert_close(model.logits(model(batch)), expected_logits(), rtol=1e-4, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    back = Transformer.from_pretrained(tmp_path / "theirs")
    for (name, ours), (_, read) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        torch.testing.assert_close(read, ours, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(back.logits(back(batch)), expected_logits(), rtol=1e-4, atol=1e-4)


def test_a_packed_segment_is_a_segment_alone():
    model, alone = random_model(tiny()), documents(5, 40, 1, 17, 18)
    packed = model(SegmentBatch.from_documents(alone)).split([len(document) for document in alone])
    for document, hidden in zip(alone, packed, strict=True):
        torch.testing.assert_close(model(SegmentBatch.from_documents([document])), hidden, rtol=1e-5, atol=1e-5)


def test_shared_prompts_equal_copied_prompts_and_so_do_gradients():
    prompts, responses = documents(11, 4), [documents(3, 8), documents(1, 5, 6)]
    shared = SegmentBatch.from_groups(prompts, responses)
    copied = SegmentBatch.from_documents(
        [prompt + response for prompt, group in zip(prompts, responses, strict=True) for response in group],
        masks=[
            [False] * len(prompt) + [True] * len(response)
            for prompt, group in zip(prompts, responses, strict=True)
            for response in group
        ],
    )
    results = []
    for batch in (shared, copied):
        model = random_model(tiny())
        logits = model.logits(model(batch)[batch.predictors[batch.target_mask]])
        cross_entropy(logits, batch.target_ids[batch.target_mask], reduction="sum").backward()
        results.append((logits, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_norm_is_torchs_forward_and_backward():
    torch.manual_seed(0)
    norm, x = RMSNorm(37, 1e-5), (torch.randn(9, 37) * 3).requires_grad_()
    torch.nn.init.normal_(norm.weight)
    exact, weight = (tensor.detach().double().requires_grad_() for tensor in (x, norm.weight))
    out, expected = norm(x), rms_norm(exact, (37,), weight, 1e-5)
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


def test_half_precision_products_keep_float32_weights_and_residuals():
    model, batch = random_model(tiny()), SegmentBatch.from_groups([[1, 2, 3]], [[[4, 5], [6]]])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(batch)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, model(batch), rtol=0.1, atol=0.1)
    hidden.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.layers.parameters())


def test_what_is_not_built_is_refused_before_it_is_trained():
    with pytest.raises(UserError, match="mixture-of-experts layers are not built yet"):
        Transformer(tiny(family="qwen2_moe", num_experts=4))
    with pytest.raises(UserError, match="'mamba' is not built yet"):
        Transformer(tiny(family="mamba"))
    with pytest.raises(UserError, match="attention_bias: is False, but Qwen2ForCausalLM always has True"):
        Transformer(tiny(attention_bias=False))
    with pytest.raises(UserError, match="'gelu' is not built yet"):
        Transformer(tiny(hidden_act="gelu"))
    with pytest.raises(UserError, match="'yarn' is not built yet"):
        Transformer(tiny(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}))


@pytest.mark.parametrize(
    "shape",
    [dict(num_key_value_heads=4), dict(hidden_size=50), dict(hidden_size=54), dict(vocab_size=0)],
    ids=["groups", "width", "odd head", "empty vocabulary"],
)
def test_impossible_shapes_are_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"num_key_value_heads|hidden_size|head size|vocab_size"):
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
