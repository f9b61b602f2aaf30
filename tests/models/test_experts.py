"""Mixture of experts: the layer against the formula, and the model against transformers' Qwen2Moe through files."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu

from lightning_llm.batch import SegmentBatch
from lightning_llm.generation.engine import generate
from lightning_llm.models import ModelConfig, Transformer, families
from lightning_llm.models.experts import MixtureOfExperts, grouped_product
from lightning_llm.objectives.config import CausalLMConfig
from lightning_llm.settings import UserError

ODD = dict(moe_intermediate_size=13, shared_expert_intermediate_size=29)  # rows that torch's grouped product refuses
EVEN = dict(moe_intermediate_size=16, shared_expert_intermediate_size=24)
CASES = {
    "odd sizes": dict(ODD),
    "weights add up to one, aligned": dict(EVEN, norm_topk_prob=True),
    "one expert of seven": dict(ODD, num_experts=7, num_experts_per_tok=1),
    "all experts, tied": dict(ODD, num_experts_per_tok=5, norm_topk_prob=True, tie_word_embeddings=True),
    "every second layer": dict(ODD, decoder_sparse_step=2),
    "some layers dense": dict(ODD, mlp_only_layers=[0, 2]),
    "yarn": dict(
        ODD,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 500,
            "truncate": False,
            "mscale": 1.7,
            "mscale_all_dim": 0.4,
        },
    ),
}


def tiny(**changes) -> ModelConfig:
    shape = dict(name="tiny", family="qwen2_moe", vocab_size=101, hidden_size=48, intermediate_size=71)
    heads = dict(num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)
    return ModelConfig(**{**shape, **heads, "num_experts": 5, "num_experts_per_tok": 2, **ODD, **changes})


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if name.endswith("mlp.gate.weight") else 0.1  # a router that tells tokens apart
            parameter.normal_(1.0 if "norm" in name else 0.0, spread, generator=generator)
    return model


def documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 101, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def peer():
    from transformers import Qwen2MoeForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def load(directory):
        return Qwen2MoeForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )

    return load


def by_expert(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reference holds all experts of a layer in one parameter; here under the names that its files have."""
    found = {}
    for name, gradient in gradients.items():
        block, experts, projection = name.partition(".experts.")
        if not experts:
            found[name] = gradient
            continue
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        for expert, matrix in enumerate(gradient):
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                found[f"{block}.experts.{expert}.{part}.weight"] = rows
    return found


def plain(layer: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """The formula in float64, token by token."""
    weights = {name: parameter.double() for name, parameter in layer.named_parameters()}
    gate_up, down = weights["experts.gate_up_proj.weight"], weights["experts.down_proj.weight"]
    outputs = []
    for token in x.double():
        probabilities = (weights["gate.weight"] @ token).softmax(0)
        values, experts = probabilities.sort(descending=True)
        values = values[: layer.chosen] / (values[: layer.chosen].sum() if layer.norm_topk_prob else 1)
        shared = weights["shared_expert.down_proj.weight"] @ (
            silu(weights["shared_expert.gate_proj.weight"] @ token) * (weights["shared_expert.up_proj.weight"] @ token)
        )
        total = torch.sigmoid(weights["shared_expert_gate.weight"] @ token) * shared
        for value, expert in zip(values, experts, strict=False):
            gate, up = (gate_up[expert] @ token).chunk(2)
            total = total + value * (down[expert] @ (silu(gate) * up))
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize("shape", [CASES["odd sizes"], CASES["weights add up to one, aligned"]], ids=["odd", "aligned"])
def test_the_layer_is_the_formula_for_every_token_and_in_every_gradient(shape, tokens, device):
    layer = random_model(tiny(**shape)).layers[0].mlp.to(device)
    x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    upstream = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(2)).to(device)
    inputs = [x, *layer.parameters()]
    expected = plain(layer, x)
    wanted = torch.autograd.grad(expected, inputs, upstream.double())
    out = layer(x)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out, inputs, upstream)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert layer.routed.load.sum() == tokens * layer.chosen  # none is dropped


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [16, 13], ids=["aligned", "odd"])
def test_an_expert_without_tokens_has_a_gradient_of_zero(size, dtype, device):
    weight = torch.randn(4, size, 8, device=device, dtype=dtype, requires_grad=True)
    x = torch.randn(9, 8, device=device, dtype=dtype)
    out = grouped_product(x, weight, torch.tensor([0, 5, 5, 9], dtype=torch.int32, device=device))
    torch.testing.assert_close(out, torch.cat([x[:5] @ weight[1].T, x[5:] @ weight[3].T]), rtol=1e-2, atol=1e-2)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert weight.grad[0].eq(0).all()
    assert weight.grad[2].eq(0).all()
    torch.testing.assert_close(weight.grad[1], upstream[:5].T @ x[:5], rtol=2e-2, atol=2e-2)


def test_all_tokens_may_choose_the_same_experts():
    model = random_model(tiny())
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.gate.weight.zero_()  # even probabilities: the same two experts for every token
    batch = SegmentBatch.from_documents(documents(40))
    model.logits(model(batch)).square().sum().backward()
    routed = model.take_routed()
    assert [sorted(layer.load.tolist()) for layer in routed] == [[0, 0, 0, 40, 40]] * 3
    for layer in model.layers:
        experts = layer.mlp.experts
        unused = layer.mlp.experts.down_proj.weight.grad.flatten(1).norm(dim=1).eq(0)
        assert unused.sum() == 3
        assert all(p.grad.isfinite().all() for p in experts.parameters())


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_logits_loss_and_gradients_equal_transformers_through_files(shape, peer, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "SHARD_BYTES", 40_000)
    model = random_model(tiny(**shape))
    model.save_pretrained(tmp_path / "ours", eos_token_ids=[5, 6])
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    theirs = peer(tmp_path / "ours")
    rows = torch.tensor(documents(17, 17, 17))  # rows of one length: their auxiliary loss is over all tokens
    batch = SegmentBatch.from_documents(rows.tolist())
    expected = theirs(rows, labels=rows, output_router_logits=True)
    torch.testing.assert_close(model.logits(model(batch)), expected.logits.flatten(0, 1), rtol=1e-4, atol=1e-4)

    part = CausalLMConfig().build(model).trained_loss(batch)
    loss = part.loss / part.count + part.per_token / rows.numel()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part.metrics["router/aux_loss"][0] / rows.numel(), expected.aux_loss)

    loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    wanted = by_expert({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for key, gradient in families.stored_parts(model.config, gradients):
        torch.testing.assert_close(
            gradient, wanted.pop(key), rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert not wanted

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    back = Transformer.from_pretrained(tmp_path / "theirs")
    assert families.read_config(tmp_path / "theirs") == back.config
    for (name, own), (_, read) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(read, own), name


def test_a_packed_segment_is_a_segment_alone_and_a_shared_prompt_a_copied_one():
    model, alone = random_model(tiny()), documents(5, 40, 1, 17)
    packed = model(SegmentBatch.from_documents(alone)).split([len(document) for document in alone])
    for document, hidden in zip(alone, packed, strict=True):
        torch.testing.assert_close(model(SegmentBatch.from_documents([document])), hidden, rtol=1e-5, atol=1e-5)
    shared = model(SegmentBatch.from_groups([alone[0]], [[alone[2], alone[3]]]))
    copied = model(SegmentBatch.from_documents([alone[0] + alone[3]]))
    torch.testing.assert_close(shared[-17:], copied[-17:], rtol=1e-5, atol=1e-5)


def test_files_name_every_expert_and_may_be_sharded(peer, tmp_path, monkeypatch):
    model = random_model(tiny())
    monkeypatch.setattr(families, "SHARD_BYTES", 20_000)
    model.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    names = {key.removeprefix("model.layers.1.mlp.") for key in index if ".layers.1.mlp." in key}
    assert names == {
        "gate.weight",
        "shared_expert_gate.weight",
        *(f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"experts.{expert}.{part}_proj.weight" for expert in range(5) for part in ("gate", "up", "down")),
    }
    first = next(key for key in index if key.endswith("layers.1.mlp.experts.3.up_proj.weight"))
    up = load_file(tmp_path / index[first])[first]
    assert torch.equal(up, model.layers[1].mlp.experts.gate_up_proj.weight[3, 13:])
    theirs = peer(tmp_path).state_dict()
    assert torch.equal(theirs["model.layers.1.mlp.experts.gate_up_proj"][3, 13:], up)
    back = Transformer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


@pytest.mark.parametrize("spelling", ["4", "5"])
def test_both_spellings_of_config_json_are_read(spelling, tmp_path):
    from transformers import AutoConfig

    config = tiny(norm_topk_prob=True, router_aux_loss_coef=0.02, mlp_only_layers=[1])
    Transformer(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    gone = ("rope_parameters", "dtype") if spelling == "4" else ("rope_theta", "rope_scaling", "torch_dtype")
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in gone}))
    read = families.read_config(tmp_path)
    assert read == replace(config, name=read.name)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Qwen2MoeConfig"
    assert (theirs.num_experts, theirs.norm_topk_prob, theirs.router_aux_loss_coef) == (5, True, 0.02)
    assert (theirs.mlp_only_layers, theirs.decoder_sparse_step, theirs.rope_parameters["rope_theta"]) == ([1], 1, 1e4)


def test_files_that_do_not_fit_are_refused(tmp_path):
    random_model(tiny()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"num_experts": None}, "num_experts: should be of type int, is None"),
        ({"num_experts": 6}, "lacks 9 tensors|of shape|has shape"),
        ({"mlp_only_layers": ["0"]}, r"mlp_only_layers: should be of type list\[int\]"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok must lie in \[1, num_experts\], got 9 of 5"),
        ({"qkv_bias": False}, "qkv_bias: False is not built yet"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=message):
            Transformer.from_pretrained(tmp_path)


def test_a_dense_family_has_no_experts_and_the_other_way_round():
    with pytest.raises(UserError, match="num_experts: is 5, but Qwen2ForCausalLM always has 0"):
        Transformer(tiny(family="qwen2"))
    with pytest.raises(UserError, match="num_experts: is 0 in family qwen2_moe"):
        Transformer(tiny(num_experts=0))


@pytest.mark.parametrize(
    "wrong",
    [dict(num_experts_per_tok=0), dict(num_experts_per_tok=6), dict(moe_intermediate_size=0),
     dict(shared_expert_intermediate_size=0), dict(decoder_sparse_step=0), dict(router_aux_loss_coef=-0.1),
     dict(hidden_act="relu")],
)  # fmt: skip
def test_impossible_shapes_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tiny(**wrong)


def test_half_precision_products_keep_a_float32_router():
    model, batch = random_model(tiny(**EVEN)), SegmentBatch.from_documents(documents(30))
    layer, x = model.layers[0].mlp, torch.randn(30, 48)
    exact, routed = layer(x), layer.routed
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
    assert torch.equal(layer.routed.probability, routed.probability)
    assert torch.equal(layer.routed.load, routed.load)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(batch)
    hidden.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.layers.parameters())


def test_what_was_routed_is_taken_once_and_never_copied():
    model, batch = random_model(tiny(mlp_only_layers=[1])), SegmentBatch.from_documents(documents(7))
    model(batch)
    assert copy.deepcopy(model).take_routed() == []
    routed = model.take_routed()
    assert [layer.tokens for layer in routed] == [7, 7]
    assert model.take_routed() == []
    assert random_model(tiny(family="qwen2", num_experts=0)).take_routed() == []


def test_greedy_generation_equals_transformers(peer, tmp_path):
    model = random_model(tiny())
    model.save_pretrained(tmp_path)
    theirs = peer(tmp_path)
    prompts = documents(3, 8)
    found = generate(model, prompts, max_new_tokens=6, stop_ids=[])
    for prompt, response in zip(prompts, found, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert response == expected[0, len(prompt) :].tolist()


def test_experts_start_as_matrices_do():
    model = Transformer(tiny(num_experts=32, hidden_size=60))
    model.reset_parameters(1)
    for weight in (model.layers[0].mlp.experts.gate_up_proj.weight, model.layers[0].mlp.experts.down_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert not torch.equal(weight[0], weight[1])
