"""Hugging Face directories: both spellings of config.json, shards, and files that do not fit."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_llm.models import ModelConfig, Transformer, families
from lightning_llm.settings import UserError

CONFIG = ModelConfig(
    name="tiny",
    vocab_size=31,
    hidden_size=12,
    intermediate_size=17,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 54_321.0},
    max_position_embeddings=77,
    initializer_range=0.03,
)


@pytest.fixture
def saved(tmp_path):
    """A directory with a small model's files."""
    directory = tmp_path / "tiny"
    model = Transformer(CONFIG)
    model.reset_parameters(0)
    model.save_pretrained(directory, eos_token_ids=[3, 4])
    return directory


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value != "gone"}))


def test_the_directory_is_complete_and_reads_back(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert families.read_config(saved) == CONFIG
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [3, 4]
    header = (saved / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", header[:8])
    stored = json.loads(header[8 : 8 + length])
    assert stored["__metadata__"] == {"format": "pt"}
    assert {"lm_head.weight", "model.layers.1.self_attn.k_proj.bias", "model.layers.0.mlp.gate_proj.weight"} < set(
        stored
    )


def test_tied_models_store_no_head(tmp_path):
    Transformer(ModelConfig(**{**vars(CONFIG), "tie_word_embeddings": True})).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert Transformer.from_pretrained(tmp_path).lm_head is None


@pytest.mark.parametrize("spelling", ["4", "5"])
def test_both_spellings_are_written_and_each_alone_is_read(saved, spelling):
    from transformers import AutoConfig

    old = {"rope_theta": "gone", "rope_scaling": "gone", "torch_dtype": "gone"}
    new = {"rope_parameters": "gone", "dtype": "gone"}
    edit(saved / "config.json", **(new if spelling == "4" else old))
    assert families.read_config(saved) == CONFIG
    theirs = AutoConfig.from_pretrained(saved)
    assert theirs.rope_parameters == CONFIG.rope_parameters
    assert (theirs.dtype, theirs.rms_norm_eps, theirs.tie_word_embeddings) == (torch.float32, 1e-5, False)


def test_scaled_rope_of_the_old_spelling_is_read_as_such(saved):
    edit(saved / "config.json", rope_parameters="gone", rope_scaling={"type": "yarn", "factor": 4.0})
    rope = families.read_config(saved).rope_parameters
    known = {"rope_type": "yarn", "rope_theta": 54_321.0, "factor": 4.0}
    assert rope == known | {"original_max_position_embeddings": 77}  # as transformers takes it
    edit(saved / "config.json", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UserError, match=r"config.json: rope_parameters.rope_type 'dynamic' is not built yet"):
        Transformer.from_pretrained(saved)


def test_a_window_that_no_layer_uses_is_none(saved):
    """Released files of Qwen 2 name a window beside more full layers than there are."""
    edit(saved / "config.json", use_sliding_window=True, sliding_window=4, max_window_layers=28, layer_types="gone")
    assert families.read_config(saved) == CONFIG


@pytest.mark.parametrize("key", ["max_window_layers", "num_hidden_layers"])
def test_an_older_window_of_no_layers_is_refused(saved, key):
    edit(saved / "config.json", use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types="gone")
    edit(saved / "config.json", **{key: None})
    with pytest.raises(UserError, match=rf"config\.json: {key}: should be of type int, is None"):
        families.read_config(saved)


def test_files_from_before_grouped_queries_have_as_many_keys_as_queries(saved):
    edit(saved / "config.json", num_key_value_heads="gone")
    assert families.read_config(saved).num_key_value_heads == CONFIG.num_attention_heads


def test_others_may_read_what_they_may_read_of_the_rest(saved):
    modes = {path.name: path.stat().st_mode for path in saved.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_shards_are_written_and_read(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "SHARD_BYTES", 2000)
    model = Transformer.from_pretrained(saved)
    model.save_pretrained(tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(4 * parameter.numel() for parameter in model.parameters())
    from transformers import Qwen2ForCausalLM, logging

    logging.disable_progress_bar()
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path / "shards").state_dict()
    assert torch.equal(theirs["lm_head.weight"], model.head_weight)
    back = Transformer.from_pretrained(tmp_path / "shards")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


@pytest.mark.parametrize(("before", "after"), [(10**9, 2000), (2000, 10**9), (2000, 5000)], ids=["1-n", "n-1", "n-m"])
def test_weights_of_before_are_replaced_and_other_files_are_left(before, after, tmp_path, monkeypatch):
    """Whatever lay there, what is read back is what was written last, by us and by transformers."""
    from transformers import AutoModelForCausalLM

    old, new = Transformer(CONFIG), Transformer(CONFIG)
    old.reset_parameters(0)
    new.reset_parameters(1)
    for model, size in ((old, before), (new, after)):
        monkeypatch.setattr(families, "SHARD_BYTES", size)
        model.save_pretrained(tmp_path)
        (tmp_path / "model_of_mine.safetensors").write_text("precious")
    back = Transformer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), back.parameters(), strict=True))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()["lm_head.weight"], new.head_weight)
    kept = {path.name for path in tmp_path.glob("*.safetensors*")} - {"model_of_mine.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert kept == named | ({index.name} if index.exists() else set())
    assert (tmp_path / "model_of_mine.safetensors").read_text() == "precious"


def test_other_types_are_converted_on_reading(saved):
    model = Transformer.from_pretrained(saved, dtype=torch.bfloat16)
    assert model.norm.weight.dtype == model.head_weight.dtype == torch.bfloat16
    model.save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(saved / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def truncated(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def garbled(directory):
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)


def without(key):
    def change(directory):
        tensors = load_file(directory / "model.safetensors")
        del tensors[key]
        save_file(tensors, directory / "model.safetensors")

    return change


def put(key, tensor):
    def change(directory):
        save_file({**load_file(directory / "model.safetensors"), key: tensor}, directory / "model.safetensors")

    return change


def index_of(weight_map):
    def change(directory):
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def config(**changes):
    return lambda directory: edit(directory / "config.json", **changes)


DAMAGE = {
    "truncated": (truncated, r"tiny/model.safetensors: is not a readable safetensors file"),
    "garbled": (garbled, r"tiny/model.safetensors: is not a readable safetensors file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"tiny: has neither model.safetensors nor"),
    "lost tensor": (without("model.norm.weight"), r"tiny: lacks 1 tensors, the first model.norm.weight"),
    "foreign tensor": (put("score.weight", torch.ones(2)), r"tiny/model.safetensors: score.weight: config.json leaves"),
    "other shape": (put("model.norm.weight", torch.ones(13)), r"model.norm.weight: has shape \[13\], .* \[12\]"),
    "integers": (put("model.norm.weight", torch.ones(12, dtype=torch.int8)), r"norm.weight: is of type I8"),
    "empty index": (index_of({}), r"index.json: weight_map: is missing or empty"),
    "lost shard": (index_of({"lm_head.weight": "model-2.safetensors"}), r"tiny/model-2.safetensors: is not a readable"),
    "path in index": (
        index_of({"lm_head.weight": "../x.safetensors"}),
        r"'../x.safetensors' is not the name of",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), r"tiny/config.json: is not there"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), r"tiny/config.json: is not readable JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), r"tiny/config.json: is not a JSON object"),
    "other family": (config(model_type="gpt2"), r"config.json: model_type: 'gpt2' is not built yet"),
    "lost size": (config(hidden_size="gone"), r"config.json: hidden_size: should be of type int, is None"),
    "size as text": (config(vocab_size="31"), r"config.json: vocab_size: should be of type int, is '31'"),
    "size as truth": (config(vocab_size=True), r"config.json: vocab_size: should be of type int, is True"),
    "impossible heads": (config(num_key_value_heads=2), r"config.json: num_attention_heads \(3\) must be a multiple"),
    "window": (
        config(use_sliding_window=True, sliding_window="4k", max_window_layers=0, layer_types="gone"),
        r"config.json: sliding_window: should be of type int \| None, is '4k'",
    ),
    "layer types": (
        config(use_sliding_window=True, sliding_window=4, layer_types="full_attention"),
        r"config.json: layer_types: should be of type list\[str\], is 'full_attention'",
    ),
    "bias": (
        config(model_type="llama", attention_bias=True),
        r"config.json: attention_bias: True is not built yet. Only false is read",
    ),
    "quantised": (config(quantization_config={"bits": 4}), r"config.json: quantization_config: quantised weights"),
    "rope as text": (config(rope_parameters="x"), r"config.json: rope_parameters, rope_scaling: should be JSON obj"),
    "theta as text": (config(rope_parameters={"rope_theta": "x"}), r"config.json: rope_theta: should be a number"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_files_that_do_not_fit_are_named_with_the_key(saved, damage):
    change, message = damage
    change(saved)
    with pytest.raises(UserError, match=message):
        Transformer.from_pretrained(saved)
