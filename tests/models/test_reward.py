"""A reward model's scores against transformers' own class, through files in both directions, in every family."""

import copy

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer, families
from lightning_llm.models.config import FULL, SLIDING
from lightning_llm.models.reward import RewardModel
from lightning_llm.settings import UserError

PAD = 100  # of the vocabulary's 101 entries, in no text
SHAPES = {
    "Qwen2": dict(family="qwen2"),
    "Qwen2Moe": dict(
        family="qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    ),
    "Qwen3": dict(family="qwen3", attention_bias=False, qk_norm=True, head_dim=14, tie_word_embeddings=True),
    "Gemma2": dict(
        family="gemma2",
        attention_bias=False,
        hidden_act="gelu_pytorch_tanh",
        post_norms=True,
        norms_add_one=True,
        scale_embeddings=True,
        sliding_window=5,
        layer_types=[SLIDING, FULL],
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=7,
        tie_word_embeddings=True,
    ),
    "Llama": dict(family="llama", attention_bias=False),
}


def reward_model(shape, graded=()):
    sizes = dict(vocab_size=101, hidden_size=48, intermediate_size=71, num_hidden_layers=2)
    heads = dict(num_attention_heads=6, num_key_value_heads=2, initializer_range=0.2)
    backbone = Transformer(ModelConfig(name="tiny", **sizes, **heads, **shape))
    backbone.reset_parameters(1)
    return RewardModel.from_backbone(backbone, seed=2, graded=graded)


def texts(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, PAD, (n,), generator=generator).tolist() for n in lengths]


def theirs(directory, name):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"experts_implementation": "eager"} if name == "Qwen2Moe" else {}
    cls = getattr(transformers, f"{name}ForSequenceClassification")
    return cls.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", **options)


@pytest.mark.parametrize("name", SHAPES)
def test_scores_and_gradients_are_those_of_transformers_both_ways(name, tmp_path):
    model = reward_model(SHAPES[name])
    model.save_pretrained(tmp_path / "ours", eos_token_ids=[7, PAD])
    peer = theirs(tmp_path / "ours", name)
    alone = texts(13, 4, 21)
    scores = model.scores(SegmentBatch.from_documents(alone))
    padded = torch.tensor([text + [PAD] * (21 - len(text)) for text in alone])
    expected = peer(padded, attention_mask=(padded != PAD).long()).logits[:, 0]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert scores.std() > 1e-2

    scores.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(model.score.weight.grad, peer.score.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.embed_tokens.weight.grad[:PAD], peer.get_input_embeddings().weight.grad[:PAD], rtol=1e-4, atol=1e-4
    )

    torch.optim.SGD(peer.parameters(), lr=1e-2).step()
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    back = RewardModel.from_pretrained(tmp_path / "theirs")
    expected = torch.cat([peer(torch.tensor([text])).logits[0] for text in alone])
    torch.testing.assert_close(back.scores(SegmentBatch.from_documents(alone)), expected, rtol=1e-4, atol=1e-4)


def test_a_score_is_read_where_it_is_asked_for():
    model, (prompt, first, second) = reward_model(SHAPES["Qwen2"]), texts(6, 3, 8)
    batch = SegmentBatch.from_groups([prompt], [[first, second]])
    whole = SegmentBatch.from_documents([prompt, prompt + first, prompt + second])
    torch.testing.assert_close(model.scores(batch), model.scores(whole), rtol=1e-5, atol=1e-5)
    early = model.scores(batch, torch.tensor([0, 7, 9]))  # after one token of each
    cut = SegmentBatch.from_documents([prompt[:1], prompt + first[:2], prompt + second[:1]])
    torch.testing.assert_close(early, model.scores(cut), rtol=1e-5, atol=1e-5)


def test_the_backbone_is_taken_over_and_the_heads_follow_the_seed():
    backbone = Transformer(ModelConfig(vocab_size=11, hidden_size=8, num_attention_heads=2, num_key_value_heads=1))
    backbone.reset_parameters(0)
    first, again, other = (RewardModel.from_backbone(copy.deepcopy(backbone), seed) for seed in (4, 4, 5))
    for model in (first, again, other):
        assert torch.equal(model.embed_tokens.weight, backbone.embed_tokens.weight)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)


def test_grading_networks_lie_beside_the_model_and_come_back(tmp_path):
    model = reward_model(SHAPES["Llama"], graded=["truthfulness", "verbosity"])
    model.save_pretrained(tmp_path)
    assert not any("grading" in name for name in theirs(tmp_path, "Llama").state_dict())
    back = RewardModel.from_pretrained(tmp_path)
    assert list(back.grading) == ["truthfulness", "verbosity"]
    for mine, its in zip(model.parameters(), back.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_a_model_with_another_head_is_refused(tmp_path):
    model = reward_model(SHAPES["Qwen3"])  # tied: its tensors would do for a language model
    model.save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match="holds a reward model, a language model is asked for"):
        Transformer.from_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match="holds a reward model"):
        Transformer.check_pretrained(tmp_path / "reward")
    backbone = Transformer(model.config)
    backbone.reset_parameters(0)
    backbone.save_pretrained(tmp_path / "language")
    with pytest.raises(UserError, match="holds a language model, a reward model is asked for"):
        RewardModel.from_pretrained(tmp_path / "language")
    assert families.read_head(tmp_path / "language") == families.LANGUAGE_MODEL
    with pytest.raises(TypeError, match="no vocabulary's head"):
        model.logits(torch.zeros(1, 48))
