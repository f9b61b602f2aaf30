"""Tensors read and written one at a time: as safetensors itself reads them, and no more of them alive than needed."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_llm.merging.averaging import linear
from lightning_llm.merging.spherical import slerp_task_vectors
from lightning_llm.merging.task_vectors import ties
from lightning_llm.models import ModelConfig, Transformer, families
from lightning_llm.models.shards import Shards, refuse_unlike_shards, write_shards
from lightning_llm.settings import UserError

CONFIG = ModelConfig(
    name="tiny", vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
)  # fmt: skip


def model_in(folder, seed, config=CONFIG, shards=3, dtype=torch.float32):
    """A directory of random weights in so many files."""
    model = Transformer(config)
    model.reset_parameters(seed)
    model.to(dtype)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "SHARD_BYTES", total if shards == 1 else total // shards + 2000)
        model.save_pretrained(folder, eos_token_ids=[1])
    assert len(list(folder.glob("*.safetensors"))) == shards
    return folder


def all_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture
def three(tmp_path):
    """Three models in three files each."""
    return [model_in(tmp_path / str(seed), seed) for seed in range(3)]


def test_it_is_the_state_on_disk(three):
    shards, expected = Shards(three[0]), all_of(three[0])
    assert shards.keys() == expected.keys()
    assert len(shards.files) == 3
    for name, tensor in expected.items():
        assert torch.equal(shards[name], tensor)
        assert (shards.dtype_of(name), shards.shape_of(name)) == (tensor.dtype, list(tensor.shape))


def test_what_is_written_is_read_by_safetensors_by_us_and_by_transformers(three, tmp_path):
    states = [Shards(folder) for folder in three]
    output = tmp_path / "merged"
    output.mkdir()
    (output / "config.json").write_bytes((three[0] / "config.json").read_bytes())
    write_shards(output, linear.lazily(states), states[0])
    assert {path.name for path in output.glob("*.safetensors")} == set(states[0].files)
    expected = {name: sum(all_of(folder)[name].double() for folder in three) / 3 for name in states[0]}
    for name, tensor in all_of(output).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7)
    ours = dict(Transformer.from_pretrained(output).named_parameters())
    theirs = AutoModelForCausalLM.from_pretrained(output).state_dict()
    torch.testing.assert_close(theirs["model.norm.weight"], ours["norm.weight"])
    torch.testing.assert_close(theirs["model.layers.2.mlp.up_proj.weight"], ours["layers.2.mlp.up_proj.weight"])
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in expected.values())


def test_one_file_of_another_name_keeps_its_index(tmp_path):
    """Some directories have a single shard and an index that leads to it."""
    folder, output = model_in(tmp_path / "a", 0, shards=1), tmp_path / "copy"
    name = "model-00001-of-00001.safetensors"
    weights = all_of(folder)
    (folder / "model.safetensors").rename(folder / name)
    index = {"weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    output.mkdir()
    (output / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({"stale": torch.ones(1)}, output / "model.safetensors")
    write_shards(output, Shards(folder), Shards(folder))
    assert {path.name for path in output.iterdir()} == {"config.json", name, "model.safetensors.index.json"}
    back = Transformer.from_pretrained(output)
    assert torch.equal(back.head_weight, weights["lm_head.weight"])


def test_types_are_those_of_the_first(tmp_path):
    half, full = model_in(tmp_path / "a", 0, dtype=torch.bfloat16, shards=1), model_in(tmp_path / "b", 1, shards=1)
    mixed = all_of(half)
    mixed["model.norm.weight"] = mixed["model.norm.weight"].float()  # two types in a file, an odd number of bytes
    save_file(mixed, half / "model.safetensors")
    states, output = [Shards(half), Shards(full)], tmp_path / "merged"
    output.mkdir()
    write_shards(output, linear.lazily(states), states[0])
    for name, tensor in load_file(output / "model.safetensors").items():
        expected = (mixed[name].float() + all_of(full)[name]) / 2
        assert torch.equal(tensor, expected.to(mixed[name].dtype))


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_a_tensor_of_each_model_is_in_memory_and_no_more(method, three, tmp_path, monkeypatch):
    states, alive, most = [Shards(folder) for folder in three], weakref.WeakSet(), []
    read = Shards.__getitem__

    class Tracked(torch.Tensor):
        """So that it can be told apart from what is computed."""

    def tracked(self, name):
        tensor = read(self, name).as_subclass(Tracked)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(Shards, "__getitem__", tracked)
    gc.collect()
    start, *models = states
    merged = {
        "linear": lambda: linear.lazily(states),
        "slerp": lambda: slerp_task_vectors.lazily(start, models),
        "ties": lambda: ties.lazily(start, models, 0.3),
    }[method]()
    output = tmp_path / "merged"
    output.mkdir()
    write_shards(output, merged, models[0])
    tensors = len(states[0])
    assert len(most) >= 3 * tensors
    assert max(most) <= 6, "of some 30 tensors in each of three models"


def test_tensors_that_are_no_parameters_are_left_out(tmp_path):
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    folder = model_in(tmp_path / "a", 0, config=tied, shards=1)
    weights = all_of(folder)
    more = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights | more, folder / "model.safetensors")
    assert Shards(folder).keys() == weights.keys()


def test_what_does_not_fit_is_named(three, tmp_path):
    wider = model_in(tmp_path / "wide", 0, config=dataclasses.replace(CONFIG, intermediate_size=32))
    deeper = model_in(tmp_path / "deep", 0, config=dataclasses.replace(CONFIG, num_hidden_layers=4))
    with pytest.raises(UserError, match=r"wide: model.layers.0.mlp.\w+.weight: has shape .* Merge models of one"):
        refuse_unlike_shards([Shards(three[0]), Shards(wider)])
    with pytest.raises(UserError, match=r"0: model.layers.3.\S+: is missing, .*deep has it"):
        refuse_unlike_shards([Shards(three[0]), Shards(deeper)])
    whole = next(three[1].glob("*.safetensors"))
    whole.write_bytes(whole.read_bytes()[:100])
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        Shards(three[1])
    weights = all_of(three[2])
    for path in three[2].glob("*.safetensors*"):
        path.unlink()
    save_file(weights | {"model.norm.weight": torch.ones(16, dtype=torch.int8)}, three[2] / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight: is of type I8"):
        Shards(three[2])
