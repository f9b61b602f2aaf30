"""Parameter counts against the published totals, and FLOPs against the plain formula."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from lightning_llm.models import Transformer
from lightning_llm.models.config import ModelConfig
from lightning_llm.models.reward import RewardModel
from lightning_llm.models.size import (
    ScoreHead,
    attended_pairs,
    forward_flops,
    forward_flops_per_token,
    parameter_counts,
    training_flops_per_token,
)
from lightning_llm.pipeline.composition import CONF

# Total and without embedding and head. Exact where the report prints it (Gemma 2, Table 2) or the released weights were
# counted (Qwen 2, Llama 3.1); AFM's are those of its Table 1, and 6.4e9 is all that is known of the parent.
PUBLISHED = {
    "qwen2_0_5b": (494_032_768, 357.9e6),
    "qwen2_1_5b": (1_543_714_304, 1.310e9),
    "qwen2_7b": (7_615_616_512, 6.526e9),
    "qwen2_72b": (72_706_203_648, 70.21e9),
    "qwen2_57b_a14b": (57_408_658_944, None),
    "afm_on_device": (2.73e9, 2.58e9),
    "afm_parent": (6.4e9, None),
    "gemma2_2b": (2_024_517_888 + 590_118_912, 2_024_517_888),
    "gemma2_9b": (8_324_201_984 + 917_962_752, 8_324_201_984),
    "gemma2_27b": (26_047_480_320 + 1_180_237_824, 26_047_480_320),
    "llama3_1_8b": (8_030_261_248, 6.980e9),
    "llama3_1_70b": (70_553_706_496, 68.45e9),
    "llama3_1_405b": (405_853_388_800, 401.65e9),
}


def published_model(name: str) -> ModelConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    return ModelConfig(**{key: value for key, value in values.items() if key != "defaults"})


def test_every_published_size_is_tried():
    assert PUBLISHED.keys() == {path.stem for path in (CONF / "model").glob("*.yaml")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_have_the_published_parameters_and_so_has_the_built_model(name):
    config = published_model(name)
    counts, (total, without_embedding) = parameter_counts(config), PUBLISHED[name]
    for got, wanted in ((counts["total"], total), (counts["total"] - counts["embedding"], without_embedding)):
        if isinstance(wanted, int):
            assert got == wanted
        elif wanted is not None:
            assert got == pytest.approx(wanted, rel=5e-3)
    if config.num_experts:
        assert counts["active"] == pytest.approx(14.25e9, rel=5e-4)
    else:
        assert counts["active"] == counts["total"]
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == counts["total"]


def test_counts_are_those_of_the_built_model():
    experts = dict(family="qwen2_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=7,
                   shared_expert_intermediate_size=11)  # fmt: skip
    for other in ({}, {"tie_word_embeddings": True}, experts, experts | {"decoder_sparse_step": 2},
                  experts | {"mlp_only_layers": [0, 1]}):  # fmt: skip
        config = ModelConfig(
            name="odd", vocab_size=51, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, head_dim=10, **other,
        )  # fmt: skip
        parameters = dict(Transformer(config).named_parameters())
        counts = parameter_counts(config)
        assert counts["total"] == sum(p.numel() for p in parameters.values())
        unused = sum(p.numel() * 3 // 5 for name, p in parameters.items() if ".experts." in name)
        assert counts["total"] - counts["active"] == unused


@pytest.mark.parametrize("graded", [[], ["verbosity", "truthfulness"]])
@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_has_no_head_for_the_vocabulary(graded, tied):
    config = ModelConfig(
        name="odd", vocab_size=51, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = RewardModel(config, graded)
    assert model.score_head == ScoreHead(len(graded))
    assert parameter_counts(config, model.score_head)["total"] == sum(p.numel() for p in model.parameters())
    weights = 24 + len(graded) * (24 * 24 + 3 * 24)  # of products at one token of each segment
    segments = [(7, 0), (3, 7), (5, 7)]
    less = 2 * (15 * 51 * 24 - 3 * weights)
    assert forward_flops(config, segments, model.score_head) == forward_flops(config, segments) - less
    per_token = forward_flops_per_token(config, 5, model.score_head)
    assert per_token == pytest.approx(forward_flops(config, [(5, 0)], model.score_head) / 5, rel=1e-12)


def test_flops_are_six_per_weight_and_the_causal_half_of_attention():
    config = published_model("qwen2_0_5b")
    weights = 24 * (896 * (14 + 2 * 2) * 64 + 14 * 64 * 896 + 3 * 896 * 4864) + 151_936 * 896
    for context in (1, 128, 4096):
        keys = sum(range(1, context + 1)) / context
        expected = 6 * weights + 12 * 24 * 14 * 64 * keys
        assert training_flops_per_token(config, context) == pytest.approx(expected, rel=1e-12)
        assert forward_flops_per_token(config, context) == pytest.approx(expected / 3, rel=1e-12)


def test_flops_of_a_window_are_those_of_the_keys_it_shows():
    """Every second layer of Gemma 2 sees 4,096 tokens back; counted one by one at a length where all can be."""
    config = replace(published_model("gemma2_2b"), sliding_window=5, num_hidden_layers=3)
    weights = forward_flops(config, [(1, 0)]) - 4 * 3 * 8 * 256
    for length, prefix in ((1, 0), (4, 0), (5, 0), (6, 0), (30, 0), (7, 3), (2, 9)):
        full = sum(position + 1 for position in range(prefix, prefix + length))
        seen = sum(min(position + 1, 5) for position in range(prefix, prefix + length))
        assert (attended_pairs(length, prefix), attended_pairs(length, prefix, 5)) == (full, seen)
        expected = weights * length + 4 * 8 * 256 * (2 * seen + full)  # sliding, full, sliding
        assert forward_flops(config, [(length, prefix)]) == pytest.approx(expected, rel=1e-12)
    context, window = 8192, 4096  # the closed form, w - w (w - 1) / (2 T)
    config = published_model("gemma2_2b")
    keys = 13 * (window - window * (window - 1) / (2 * context)) + 13 * (context + 1) / 2
    expected = 2 * (2_024_517_888 - 26 * 4 * 2304 - 2304 + 590_118_912) + 4 * 8 * 256 * keys
    assert forward_flops_per_token(config, context) == pytest.approx(expected, rel=1e-12)


def test_a_plan_need_not_import_torch():
    code = "import sys, lightning_llm.models.size, lightning_llm.models.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
