"""Parameter counts against the published totals, and FLOPs against the plain formula."""

import subprocess
import sys

import pytest

from lightning_llm.models.config import ModelConfig
from lightning_llm.models.size import forward_flops_per_token, parameter_counts, training_flops_per_token

# Qwen2, arXiv 2407.10671, Table 1: hidden, layers, heads, key-value heads, feed-forward, tied, rows of the embedding
DENSE = {
    "0.5B": (896, 24, 14, 2, 4864, True, 151_936),
    "1.5B": (1536, 28, 12, 2, 8960, True, 151_936),
    "7B": (3584, 28, 28, 4, 18_944, False, 152_064),
    "72B": (8192, 80, 64, 8, 29_568, False, 152_064),
}
PUBLISHED = {  # total, without embedding and head; counted from the released weights
    "0.5B": (494_032_768, 357.9e6),
    "1.5B": (1_543_714_304, 1.310e9),
    "7B": (7_615_616_512, 6.526e9),
    "72B": (72_706_203_648, 70.21e9),
}


def dense(size: str) -> ModelConfig:
    width, layers, heads, key_value_heads, feed_forward, tied, rows = DENSE[size]
    return ModelConfig(
        name=size,
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize("size", DENSE)
def test_dense_sizes_have_the_published_parameters(size):
    counts = parameter_counts(dense(size))
    total, without_embedding = PUBLISHED[size]
    assert counts["total"] == counts["active"] == total
    assert counts["total"] - counts["embedding"] == pytest.approx(without_embedding, rel=5e-4)


def test_the_mixture_of_experts_has_the_published_parameters():
    config = ModelConfig(
        name="57B-A14B",
        vocab_size=151_936,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=2560,
        shared_expert_intermediate_size=20_480,
    )
    counts = parameter_counts(config)
    assert counts["total"] == pytest.approx(57.41e9, rel=2e-4)
    assert counts["active"] == pytest.approx(14.25e9, rel=5e-4)


def test_counts_are_those_of_the_built_model():
    from lightning_llm.models import Transformer

    for tied in (True, False):
        config = ModelConfig(
            name="odd", vocab_size=51, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, head_dim=10, tie_word_embeddings=tied,
        )  # fmt: skip
        assert parameter_counts(config)["total"] == sum(p.numel() for p in Transformer(config).parameters())


def test_flops_are_six_per_weight_and_the_causal_half_of_attention():
    config = dense("0.5B")
    weights = 24 * (896 * (14 + 2 * 2) * 64 + 14 * 64 * 896 + 3 * 896 * 4864) + 151_936 * 896
    for context in (1, 128, 4096):
        keys = sum(range(1, context + 1)) / context
        expected = 6 * weights + 12 * 24 * 14 * 64 * keys
        assert training_flops_per_token(config, context) == pytest.approx(expected, rel=1e-12)
        assert forward_flops_per_token(config, context) == pytest.approx(expected / 3, rel=1e-12)


def test_a_plan_need_not_import_torch():
    code = "import sys, lightning_llm.models.size, lightning_llm.models.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
