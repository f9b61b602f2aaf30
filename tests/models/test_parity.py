"""Every dense family against transformers' own class, through files in both directions, in shapes that hide nothing."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer, families
from lightning_llm.models.config import FULL, SLIDING

CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
# an original length at which some frequencies are kept, some stretched and some in between
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 500}
QWEN2 = dict(family="qwen2")
QWEN3 = dict(family="qwen3", attention_bias=False, qk_norm=True, head_dim=14, rms_norm_eps=1e-5)
LLAMA = dict(family="llama", attention_bias=False, rms_norm_eps=1e-5)
GEMMA2 = dict(  # caps so low that they bend, a window shorter than all but one document
    family="gemma2",
    attention_bias=False,
    hidden_act="gelu_pytorch_tanh",
    head_dim=10,
    post_norms=True,
    norms_add_one=True,
    scale_embeddings=True,
    sliding_window=5,
    layer_types=[SLIDING, FULL],
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    query_pre_attn_scalar=7,
    tie_word_embeddings=True,
)
SHAPES = {
    "qwen2": QWEN2,
    "qwen2, tied, yarn": QWEN2 | dict(tie_word_embeddings=True, rope_parameters=YARN),
    "qwen2, one head of keys, large base": QWEN2
    | dict(num_attention_heads=4, num_key_value_heads=1, hidden_size=40, rope_parameters={"rope_theta": 1e6}),
    "qwen2, heads of their own size": QWEN2
    | dict(num_attention_heads=3, num_key_value_heads=3, hidden_size=20, head_dim=14),
    "qwen2, windows above full layers": QWEN2 | dict(sliding_window=6, layer_types=[FULL, SLIDING, SLIDING]),
    "afm": QWEN3 | dict(tie_word_embeddings=True, rope_parameters={"rope_theta": 5e5}),
    "qwen3, untied, windows, linear": QWEN3 | dict(sliding_window=4, layer_types=[SLIDING], rope_parameters=LINEAR),
    "llama": LLAMA | dict(rope_parameters=LLAMA3),
    "llama, tied, heads of their own size": LLAMA
    | dict(tie_word_embeddings=True, head_dim=26, rope_parameters=LLAMA3 | {"factor": 2.5, "high_freq_factor": 9.0}),
    "gemma2": GEMMA2,
    "gemma2, untied, linear, irregular layers": GEMMA2
    | dict(tie_word_embeddings=False, layer_types=[FULL, SLIDING, SLIDING], rope_parameters=LINEAR),
    "gemma2, yarn with its own factor": GEMMA2 | dict(rope_parameters=YARN | {"attention_factor": 1.7, "beta_fast": 9}),
    "llama, yarn between whole indices": LLAMA | dict(rope_parameters=YARN | {"truncate": False, "beta_fast": 5}),
    "qwen3, yarn with both mscales": QWEN3 | dict(rope_parameters=YARN | {"mscale": 2.0, "mscale_all_dim": 0.3}),
    "qwen2, yarn with one mscale": QWEN2 | dict(rope_parameters=YARN | {"mscale": 2.0}),
    "gemma2, full layers alone": GEMMA2 | dict(sliding_window=None, layer_types=[FULL]),
    "gemma2, without caps": GEMMA2
    | dict(attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=10),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def tiny(**changes) -> ModelConfig:
    shape = dict(name="tiny", vocab_size=101, hidden_size=48, intermediate_size=71, num_hidden_layers=3)
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2000, **changes}
    shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, **shape.get("rope_parameters", {})}
    return ModelConfig(**shape)


def random_model(config: ModelConfig) -> Transformer:
    """No parameter keeps a value, as a bias of 0, that would hide its being left out."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 - config.norms_add_one if "norm" in name else 0.0
            parameter.normal_(centre, 0.1, generator=generator)
    return model


def documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 101, (n,), generator=generator).tolist() for n in lengths]


def peer(shape):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return getattr(transformers, CLASSES[shape["family"]])


def opened(directory, shape):
    return peer(shape).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def their_logits(theirs, batch: SegmentBatch) -> torch.Tensor:
    """[T, V], every segment alone."""
    segments = batch.input_ids.split(batch.lengths)
    return torch.cat([theirs(segment[None]).logits[0] for segment in segments])


@shapes
def test_logits_loss_and_gradients_are_those_of_transformers(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "SHARD_BYTES", 40_000)
    model = random_model(tiny(**shape))
    model.save_pretrained(tmp_path, eos_token_ids=[5, 6])
    assert (tmp_path / "model.safetensors.index.json").exists()
    theirs = opened(tmp_path, shape)
    batch = SegmentBatch.from_documents(documents(13, 1, 90, 7))

    hidden, expected = model(batch), their_logits(theirs, batch)
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-4, atol=1e-4)
    weights = torch.ones(len(batch.target_ids))
    loss = -model.log_likelihood(hidden[batch.predictors], batch.target_ids, token_weights=weights).mean()
    expected_loss = cross_entropy(expected[batch.predictors], batch.target_ids)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected_loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for key, gradient in families.stored_parts(model.config, gradients):
        assert gradient.abs().max() > 1e-6, key  # what is not used would agree as well
        torch.testing.assert_close(gradient, wanted.pop(key), rtol=1e-4, atol=1e-5, msg=key)
    assert not wanted


@shapes
def test_what_transformers_trains_and_writes_is_read(shape, tmp_path):
    config = tiny(**shape)
    random_model(config).save_pretrained(tmp_path / "ours")
    theirs = opened(tmp_path / "ours", shape)
    batch = SegmentBatch.from_documents(documents(31, 6))
    their_logits(theirs, batch).square().mean().backward()
    torch.optim.SGD(theirs.parameters(), lr=1e-3).step()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()

    back = Transformer.from_pretrained(tmp_path / "theirs")
    for layer in range(config.num_hidden_layers):
        assert back.config.layer_attention(layer) == config.layer_attention(layer)
    torch.testing.assert_close(back.logits(back(batch)), their_logits(theirs, batch), rtol=1e-4, atol=1e-4)


@shapes
def test_config_json_of_transformers_4_says_the_same(shape, tmp_path):
    """`rope_theta` and `rope_scaling`, `torch_dtype`, no `layer_types` where the order is the one of old."""
    random_model(tiny(**shape)).save_pretrained(tmp_path)
    path, here = tmp_path / "config.json", families.read_config(tmp_path)
    content = json.loads(path.read_text())
    types = content.get("layer_types", [])
    of_old = [SLIDING, FULL, SLIDING][: len(types)] if shape["family"] == "gemma2" else sorted(types)

    def said_without(*gone: str) -> ModelConfig:
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in gone}))
        return families.read_config(tmp_path)

    assert said_without("rope_parameters", "dtype", *["layer_types"] * (types == of_old)) == here
    assert said_without("rope_theta", "rope_scaling", "torch_dtype") == here  # the words of transformers 5 alone


@shapes
def test_packed_and_shared_segments_are_segments_alone(shape):
    model, alone = random_model(tiny(**shape)), documents(5, 40, 1, 17, 18)
    packed = model(SegmentBatch.from_documents(alone)).split([len(document) for document in alone])
    for document, hidden in zip(alone, packed, strict=True):
        torch.testing.assert_close(model(SegmentBatch.from_documents([document])), hidden, rtol=1e-5, atol=1e-5)

    prompts, responses = documents(11, 4), [documents(3, 8), documents(1, 5, 6)]
    groups = list(zip(prompts, responses, strict=True))
    shared = SegmentBatch.from_groups(prompts, responses)
    copied = SegmentBatch.from_documents(
        [prompt + response for prompt, group in groups for response in group],
        masks=[[False] * len(prompt) + [True] * len(response) for prompt, group in groups for response in group],
    )
    results = []
    for batch in (shared, copied):
        model.zero_grad()
        logits = model.logits(model(batch)[batch.predictors[batch.target_mask]])
        cross_entropy(logits, batch.target_ids[batch.target_mask], reduction="sum").backward()
        results.append((logits, [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
