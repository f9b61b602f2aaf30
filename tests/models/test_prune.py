"""The pruned model against its parent with masks, in every family, and in transformers; what matters, by hand."""

import pytest
import torch
from torch import nn

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.config import FULL, SIZES, SLIDING
from lightning_llm.models.derived import pruned
from lightning_llm.models.importance import by_activation, by_magnitude
from lightning_llm.models.prune import Importance, Kept, chosen, cut
from lightning_llm.settings import UserError

QWEN3 = dict(family="qwen3", attention_bias=False, qk_norm=True, head_dim=14, rms_norm_eps=1e-3)
GEMMA2 = dict(
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
FAMILIES = {
    "qwen2": ("Qwen2ForCausalLM", dict(family="qwen2")),
    "qwen2, tied, windows": (
        "Qwen2ForCausalLM",
        dict(family="qwen2", tie_word_embeddings=True, sliding_window=4, layer_types=[FULL, SLIDING, SLIDING]),
    ),
    "afm": ("Qwen3ForCausalLM", QWEN3 | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", QWEN3),
    "llama": ("LlamaForCausalLM", dict(family="llama", attention_bias=False)),
    "gemma2": ("Gemma2ForCausalLM", GEMMA2),
    "gemma2, untied": ("Gemma2ForCausalLM", GEMMA2 | dict(tie_word_embeddings=False)),
}
families = pytest.mark.parametrize("family", FAMILIES)


def random_model(**shape) -> Transformer:
    config = dict(name="tiny", vocab_size=61, hidden_size=48, intermediate_size=37, num_hidden_layers=4)
    config |= {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 200}
    model = Transformer(ModelConfig(**(config | shape)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name and not model.config.norms_add_one), 0.2, generator=generator)
    return model


def batch() -> SegmentBatch:
    generator = torch.Generator().manual_seed(3)
    return SegmentBatch.from_documents([torch.randint(0, 61, (n,), generator=generator).tolist() for n in (13, 2, 20)])


def spread(total: int, count: int, rows: int | None = None) -> torch.Tensor:
    """Some indices in ascending order, other ones in each row."""
    generator = torch.Generator().manual_seed(total)
    drawn = [torch.randperm(total, generator=generator)[:count].sort().values for _ in range(rows or 1)]
    return drawn[0] if rows is None else torch.stack(drawn)


CUTS = {
    "units": Kept(units=spread(37, 11, 4)),
    "heads": Kept(groups=spread(3, 2, 4)),
    "channels": Kept(channels=spread(48, 30)),
    "layers": Kept(layers=torch.tensor([0, 1, 3])),
    "all": Kept(spread(37, 12, 4), spread(3, 1, 4), spread(48, 36), torch.tensor([1, 2])),
}


@torch.no_grad()
def masked(parent: Transformer, kept: Kept) -> Transformer:
    """The parent itself, with what is masked multiplied by 0 where it is computed."""
    config, width = parent.config, parent.config.hidden_size

    def mask(total: int, indices: torch.Tensor | None, each: int = 1) -> torch.Tensor:
        places = torch.zeros(total) if indices is not None else torch.ones(total)
        if indices is not None:
            places[indices] = 1
        return places.repeat_interleave(each)

    def multiply_input(module: nn.Module, by: torch.Tensor) -> None:
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * by,))

    def multiply_output(module: nn.Module, by: torch.Tensor) -> None:
        module.register_forward_hook(lambda _, __, output: output * by)

    channels = mask(width, kept.channels)
    multiply_output(parent.embed_tokens, channels)
    for place, layer in enumerate(parent.layers):
        each = config.num_attention_heads // config.num_key_value_heads * config.head_size
        multiply_input(layer.mlp.down_proj, mask(37, None if kept.units is None else kept.units[place]))
        groups = mask(3, None if kept.groups is None else kept.groups[place], each)
        multiply_input(layer.self_attn.o_proj, groups)
        stays = float(kept.layers is None or place in kept.layers)
        multiply_output(layer.self_attn.o_proj, channels * stays)
        multiply_output(layer.mlp.down_proj, channels * stays)
    return parent


@families
@pytest.mark.parametrize("what", CUTS)
@torch.no_grad()
def test_its_logits_are_those_of_the_masked_parent(family, what):
    _, shape = FAMILIES[family]
    model = random_model(**shape)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    if what == "channels" and family.startswith(("llama", "gemma2")):  # heads: 6
        with pytest.raises(UserError, match="hidden_size: 28 is no multiple of num_attention_heads"):
            cut(model, Kept(channels=spread(48, 28)))
    child = cut(model, CUTS[what])
    expected = masked(model, CUTS[what])
    texts = batch()
    torch.testing.assert_close(child.logits(child(texts)), expected.logits(expected(texts)), rtol=1e-4, atol=1e-4)
    sizes = {"units": "intermediate_size", "heads": "num_key_value_heads", "channels": "hidden_size"}
    for name, field in sizes.items():
        smaller = getattr(child.config, field) < getattr(model.config, field)
        assert smaller == (what in (name, "all"))
    assert len(child.layers) == child.config.num_hidden_layers == {"layers": 3, "all": 2}.get(what, 4)
    for parameter in child.parameters():  # nothing is shared
        parameter.zero_()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@families
@torch.no_grad()
def test_transformers_opens_it(family, tmp_path):
    import transformers

    transformers.logging.disable_progress_bar()
    name, shape = FAMILIES[family]
    child = cut(random_model(**shape), CUTS["all"])
    child.save_pretrained(tmp_path)
    theirs = getattr(transformers, name).from_pretrained(tmp_path, attn_implementation="eager")
    texts = batch()
    expected = torch.cat([theirs(ids[None]).logits[0] for ids in texts.input_ids.split(texts.lengths)])
    torch.testing.assert_close(child.logits(child(texts)), expected, rtol=1e-4, atol=1e-4)
    back = Transformer.from_pretrained(tmp_path)
    assert torch.equal(back(texts), child(texts))


@torch.no_grad()
def test_activations_are_means_over_tokens():
    """By pieces of the model that are called by hand, a layer at a time, on one text."""
    model = random_model(num_hidden_layers=2)
    ids = batch().input_ids[:9]
    text = SegmentBatch.from_documents([ids.tolist()])
    found = by_activation(model, [text, text])  # twice the same: the means stay
    inputs = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, given, out, name=name: inputs.update({name: (given[0], out)}))
    model(text)
    norms = []
    for place in range(2):
        layer = f"layers.{place}"
        x, y = inputs[layer]
        cosines = [torch.dot(a, b) / (a.norm() * b.norm()) for a, b in zip(x, y, strict=True)]
        torch.testing.assert_close(found.layers[place].float(), 1 - torch.stack(cosines).mean())
        hidden = inputs[f"{layer}.mlp.down_proj"][0]
        torch.testing.assert_close(found.units[place].float(), hidden.abs().mean(0))
        outputs = inputs[f"{layer}.self_attn.o_proj"][0]  # [T, H * D], two query heads of 8 for each of keys
        by_group = [outputs[:, 16 * g : 16 * (g + 1)].norm(dim=1).mean() for g in range(3)]
        torch.testing.assert_close(found.groups[place].float(), torch.stack(by_group))
        norms += [inputs[f"{layer}.{name}"][1] for name in ("input_layernorm", "post_attention_layernorm")]
    norms.append(inputs["norm"][1])
    torch.testing.assert_close(found.channels.float(), torch.stack([n.abs().mean(0) for n in norms]).mean(0))
    with pytest.raises(ValueError, match="no token"):
        by_activation(model, [])


@torch.no_grad()
def test_magnitudes_are_those_of_what_a_part_is_made_of():
    model = random_model(num_hidden_layers=2)
    found = by_magnitude(model)
    mlp, attention = model.layers[1].mlp, model.layers[1].self_attn
    unit = mlp.gate_proj.weight[5].norm() * mlp.up_proj.weight[5].norm() * mlp.down_proj.weight[:, 5].norm()
    torch.testing.assert_close(found.units[1, 5], unit)
    values = attention.qkv_proj.weight[(6 + 3 + 2) * 8 :]  # of the third key-value head; its queries are heads 4 and 5
    torch.testing.assert_close(found.groups[1, 2], values.norm() * attention.o_proj.weight[:, 32:].norm())
    parts = [model.embed_tokens.weight[:, 7], model.lm_head.weight[:, 7]]
    for layer in model.layers:
        parts += [layer.self_attn.qkv_proj.weight[:, 7], layer.self_attn.o_proj.weight[7]]
        parts += [layer.mlp.gate_proj.weight[:, 7], layer.mlp.up_proj.weight[:, 7], layer.mlp.down_proj.weight[7]]
    torch.testing.assert_close(found.channels[7], torch.cat(parts).norm())
    mlp.up_proj.weight[5] *= 8
    mlp.down_proj.weight[:, 5] /= 8  # the same model
    torch.testing.assert_close(by_magnitude(model).units[1, 5], unit)


def test_the_most_important_stay_in_their_order():
    importance = Importance(units=torch.tensor([[3.0, 1, 2], [0, 5, 4]]), layers=torch.tensor([0.1, 0.3]))
    kept = chosen(importance, {"intermediate_size": 2, "num_hidden_layers": 1, "hidden_size": None})
    assert kept.units.tolist() == [[0, 2], [1, 2]]
    assert kept.layers.tolist() == [1]
    assert (kept.groups, kept.channels) == (None, None)


def test_a_part_that_does_nothing_is_not_missed():
    """Every measure finds what has been switched off, and the model is what it was."""
    model = random_model(num_hidden_layers=3)
    off = spread(37, 25)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.gate_proj.weight[off] *= 1e-4
            layer.mlp.down_proj.weight[:, off] *= 1e-4
            layer.self_attn.qkv_proj.weight[(6 + 3 + 1) * 8 : (6 + 3 + 2) * 8] *= 1e-4  # values of the second head
            layer.self_attn.qkv_proj.bias[(6 + 3 + 1) * 8 : (6 + 3 + 2) * 8] *= 1e-4
        model.layers[1].mlp.down_proj.weight *= 1e-4
        model.layers[1].self_attn.o_proj.weight *= 1e-4
        expected = model.logits(model(batch()))
        sizes = {"intermediate_size": 12, "num_key_value_heads": 2}
        by_flow = cut(model, chosen(by_activation(model, [batch()]), sizes | {"num_hidden_layers": 2}))
        by_size = cut(model, chosen(by_magnitude(model), sizes))
        assert (len(by_flow.layers), len(by_size.layers)) == (2, 3)
        for child in (by_flow, by_size):
            assert child.config.intermediate_size == 12
            torch.testing.assert_close(child.logits(child(batch())), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"intermediate_size": 38}, r"intermediate_size lies in \[1, 37\]"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads lies in \[1, 3\]"),
        ({"num_hidden_layers": 5}, r"num_hidden_layers lies in \[1, 4\]"),
    ],
)
def test_more_than_there_is_cannot_stay(sizes, says):
    with pytest.raises(ValueError, match=says):
        pruned(random_model().config, sizes)


def test_a_mixture_is_not_pruned():
    mixture = dict(family="qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    model = random_model(**mixture, shared_expert_intermediate_size=8)
    with pytest.raises(ValueError, match="num_experts is 4, and only dense models are pruned"):
        cut(model, Kept(units=spread(37, 4, 4)))


def test_windows_go_with_their_layers():
    config = random_model(**GEMMA2).config
    for layers, kinds in (([0, 2], [SLIDING]), ([1, 3], [FULL]), ([0, 3], [SLIDING, FULL])):
        child = pruned(config, {"num_hidden_layers": 2}, layers)
        assert child.layer_types == kinds
        assert child.sliding_window == (5 if SLIDING in kinds else None)
    assert set(SIZES) <= vars(config).keys()
