"""Upcycled mixtures: copies are the dense model, slices are its units, and transformers opens them."""

import dataclasses

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.config import MIXTURE_FIELDS
from lightning_llm.models.derived import pruned, upcycled
from lightning_llm.models.upcycle import scales, shuffled_copies, upcycle

DENSE = ModelConfig(
    name="dense", vocab_size=41, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
FINE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.002,
}
WHOLE = FINE | {"moe_intermediate_size": None, "shared_expert_intermediate_size": None, "norm_topk_prob": True}
BATCH = SegmentBatch.from_documents([[1, 2, 3, 4, 5], [6, 7, 8]])


@pytest.fixture
def dense():
    model = Transformer(DENSE)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.3, generator=generator)
    return model


def made(dense, fields, **changes):
    options = {"experts": "slices", "reinitialised": 0.5, "of": "entries", "keeps_scale": True, "seed": 1}
    return upcycle(dense, upcycled(dense.config, fields), **(options | changes))


@torch.no_grad()
def test_copies_are_the_dense_model(dense, tmp_path):
    """Half of it by the chosen experts, whose weights add up to 1, half by the shared one, whose gate is half open."""
    mixture = made(dense, WHOLE, experts="copies")
    expected = dense.logits(dense(BATCH))
    torch.testing.assert_close(mixture.logits(mixture(BATCH)), expected, rtol=1e-4, atol=1e-4)
    chosen = [routed.load for routed in mixture.take_routed()]
    assert all((load > 0).sum() > 2 for load in chosen)  # whichever the experts are
    torch.testing.assert_close(their_logits(mixture, tmp_path), expected, rtol=1e-4, atol=1e-4)
    unscaled = made(dense, WHOLE, experts="copies", keeps_scale=False)
    assert (unscaled.logits(unscaled(BATCH)) - expected).abs().max() > 0.1


def their_logits(mixture, directory):
    import transformers

    transformers.logging.disable_progress_bar()
    mixture.save_pretrained(directory, eos_token_ids=[0])
    theirs = transformers.Qwen2MoeForCausalLM.from_pretrained(directory, attn_implementation="eager")
    return torch.cat([theirs(ids[None]).logits[0] for ids in BATCH.input_ids.split(BATCH.lengths)])


@torch.no_grad()
def test_transformers_opens_slices(dense, tmp_path):
    mixture = made(dense, FINE)
    found = mixture.logits(mixture(BATCH))
    torch.testing.assert_close(found, their_logits(mixture, tmp_path), rtol=1e-4, atol=1e-4)
    back = Transformer.from_pretrained(tmp_path)
    assert back.config == dataclasses.replace(mixture.config, name=back.config.name)
    assert back.config.router_aux_loss_coef == 0.002


def units_of(dense_mlp, gate, up, down):
    """Which hidden unit of the dense feed-forward each of an expert's is, by its rows of gate and up and its column of
    down, compared by its direction, as it may have been multiplied.
    """
    found = []
    for row, other, column in zip(gate, up, down.T, strict=True):
        same = (dense_mlp.gate_proj.weight == row).all(1) & (dense_mlp.up_proj.weight == other).all(1)
        [place] = same.nonzero().flatten().tolist()
        cosine = torch.cosine_similarity(dense_mlp.down_proj.weight[:, place], column, dim=0)
        assert cosine == pytest.approx(1, abs=1e-5)
        found.append(place)
    return found


@torch.no_grad()
def test_slices_hold_whole_units_of_shuffled_copies(dense):
    mixture = made(dense, FINE, reinitialised=0.0)
    layers = []
    for old, new in zip(dense.layers, mixture.layers, strict=True):
        experts, shared = new.mlp.experts, new.mlp.shared_expert
        units = []
        for both, down in zip(experts.gate_up_proj.weight, experts.down_proj.weight, strict=True):
            units += units_of(old.mlp, *both.chunk(2), down)
        units += units_of(old.mlp, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        assert len(units) == 6 * 8 + 12 == 60
        for copy in range(3):  # 60 are three copies of 20
            assert sorted(units[20 * copy : 20 * (copy + 1)]) == list(range(20))
        layers.append(units)
    assert layers[0] != layers[1]
    others = {name: parameter for name, parameter in mixture.named_parameters() if ".mlp." not in name}
    assert others.keys() == {name for name, _ in dense.named_parameters() if ".mlp." not in name}
    assert all(torch.equal(parameter, dense.get_parameter(name)) for name, parameter in others.items())


@torch.no_grad()
def test_an_even_router_adds_what_the_dense_feed_forward_did_in_the_mean(dense):
    """With all experts chosen alike, what comes out is a sum over units, each as often as it is held."""
    fields = FINE | {"num_experts_per_tok": 6}
    mixture = made(dense, fields, reinitialised=0.0)
    old, new = dense.layers[0].mlp, mixture.layers[0].mlp
    new.gate.weight.zero_()
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    hidden = old.act(old.gate_proj(x)) * old.up_proj(x)  # [T, n]
    units = []
    for both, down in zip(new.experts.gate_up_proj.weight, new.experts.down_proj.weight, strict=True):
        units += units_of(old, *both.chunk(2), down)
    routed = torch.bincount(torch.tensor(units), minlength=20) / (48 / 20)
    shared = new.shared_expert
    held = torch.bincount(torch.tensor(units_of(old, *(part.weight for part in shared.children()))), minlength=20)
    expected = old.down_proj(hidden * (routed + held / (12 / 20)) / 2)
    torch.testing.assert_close(new(x), expected, rtol=1e-4, atol=1e-5)
    assert routed.mean().item() == pytest.approx(1)  # over units, and so over random slices
    assert held.float().mean().item() == pytest.approx(12 / 20)


@pytest.mark.parametrize("of", ["entries", "units"])
@torch.no_grad()
def test_half_of_a_routed_expert_is_drawn_anew(dense, of):
    kept, anew = made(dense, FINE, reinitialised=0.0), made(dense, FINE, of=of)
    assert torch.equal(kept.layers[0].mlp.shared_expert.up_proj.weight, anew.layers[0].mlp.shared_expert.up_proj.weight)
    before = kept.layers[0].mlp.experts.gate_up_proj.weight.unflatten(1, (2, 8))  # [E, 2, h, d]
    after = anew.layers[0].mlp.experts.gate_up_proj.weight.unflatten(1, (2, 8))
    changed = before != after
    assert torch.equal(changed.sum(dim=(2, 3)), torch.full((6, 2), 64))  # of 8 x 16
    whole = changed.all(-1)  # [E, 2, h]
    down = kept.layers[0].mlp.experts.down_proj.weight != anew.layers[0].mlp.experts.down_proj.weight  # [E, d, h]
    if of == "units":
        assert torch.equal(whole.sum(-1), torch.full((6, 2), 4))
        assert torch.equal(whole[:, 0], whole[:, 1])
        assert torch.equal(down.all(1), whole[:, 0])
    else:
        assert whole.sum() < 5
        assert torch.equal(down.sum(dim=(1, 2)), torch.full((6,), 64))
    assert after[changed].std() == pytest.approx(before.std().item(), rel=0.1)


def test_seeds_differ_and_repeat(dense):
    one, same, other = (made(dense, FINE, seed=seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        drawn = ".mlp." in name and not name.endswith("shared_expert_gate.weight")
        assert torch.equal(a, c) != drawn, name


def test_qwen2_57b_a14b_takes_ten_copies():
    """The report's formula, ceil(n h_E / h_FFN), with the shared expert cut from the same units: 9.73 copies."""
    units = shuffled_copies(18_944, 64 * 2560 + 20_480, torch.Generator().manual_seed(0))
    counts = torch.bincount(units, minlength=18_944)
    assert len(units) == 184_320
    assert (counts.min(), counts.max()) == (9, 10)


def test_scales_by_hand():
    config = upcycled(DENSE, WHOLE)
    assert scales(config, 20) == (0.5, 1.0)
    fine = dataclasses.replace(upcycled(DENSE, FINE))
    routed, shared = scales(fine, 20)
    assert routed * (2 / 6) * (8 / 20) == pytest.approx(0.5)
    assert shared * 0.5 * (12 / 20) == pytest.approx(0.5)


def test_what_cannot_be_upcycled_says_why():
    with pytest.raises(ValueError, match="family is llama, and mixtures of experts are made of qwen2 alone"):
        upcycled(dataclasses.replace(DENSE, family="llama", attention_bias=False), FINE)
    with pytest.raises(ValueError, match="family is qwen2_moe"):
        upcycled(upcycled(DENSE, FINE), FINE)
    with pytest.raises(ValueError, match=r"num_experts_per_tok must lie in \[1, num_experts\]"):
        upcycled(DENSE, FINE | {"num_experts_per_tok": 7})
    assert set(FINE) == set(MIXTURE_FIELDS)
    assert pruned(DENSE, {}) == DENSE
