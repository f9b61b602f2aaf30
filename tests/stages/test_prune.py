"""The stage prune: by every measure a directory that transformers opens, with its tokenizer; what is kept; mistakes."""

import dataclasses
import itertools
import json

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import DataConfig
from lightning_llm.data.packing import StageData
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.models import Transformer
from lightning_llm.models.config import ActivationConfig, MagnitudeConfig, MasksConfig
from lightning_llm.models.families import read_config
from lightning_llm.models.importance import by_activation, by_magnitude
from lightning_llm.models.prune import Kept, chosen, cut
from lightning_llm.objectives.config import PruningMasksConfig
from lightning_llm.settings import UserError
from lightning_llm.stages import prune, train
from lightning_llm.stages.config import PruneSettings

SIZES = {"intermediate_size": None, "num_key_value_heads": None, "hidden_size": None, "num_hidden_layers": None}
BATCH = SegmentBatch.from_documents([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]])


def given(method, data=None, **sizes) -> PruneSettings:
    measured = data is not None
    named = {"data": data or DataConfig(), "tokens": 2000 * measured, "context": 32 * measured}
    return PruneSettings(method, **(SIZES | sizes), **named, precision="fp32", seed=4)


@pytest.fixture(scope="module")
def parent(prepared, tokenizer_artifact, settings, context_of):
    """The artifact of a short training."""
    context = context_of(settings(tokens=3000), {"data": prepared["text"], "tokenizer": tokenizer_artifact})
    train.run(context)
    return context.output


def test_by_activation_it_is_the_cut_of_what_its_data_say(
    parent, prepared, tokenizer_artifact, data_config, context_of
):
    data = data_config("text")
    inputs = {"starts_from": parent, "data": prepared["text"], "tokenizer": tokenizer_artifact}
    context = context_of(given(ActivationConfig(), data, intermediate_size=24, num_hidden_layers=1), inputs)
    result = prune.run(context)
    model = Transformer.from_pretrained(parent / "model")
    windows = StageData(prepared["text"], data, context_ramp=32, batch_ramp=2000, total_tokens=2000, seed=4)
    [batch] = windows.window(0, micro_batch_tokens=10**6).mine
    kept = chosen(by_activation(model, [batch]), {"intermediate_size": 24, "num_hidden_layers": 1})
    child = Transformer.from_pretrained(context.output / "model")
    assert torch.equal(child(BATCH), cut(model, kept)(BATCH))
    said = json.loads((context.output / "kept.json").read_text())
    assert said == {"units": kept.units.tolist(), "layers": kept.layers.tolist()}
    assert sum(result.ledger.values()) == sum(windows.ledger(windows.steps).values()) >= 2000
    assert result.flops > 0
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, child))
    assert result.metrics == {"parameters": after, "parameters/share": pytest.approx(after / before)}


def test_by_magnitude_it_needs_no_data_and_opens_in_transformers(parent, context_of):
    import transformers

    transformers.logging.disable_progress_bar()
    sizes = {"intermediate_size": 40, "num_key_value_heads": 1, "hidden_size": 24}
    context = context_of(given(MagnitudeConfig(), **sizes), {"starts_from": parent})
    prune.run(context)
    model = Transformer.from_pretrained(parent / "model")
    directory = context.output / "model"
    child = Transformer.from_pretrained(directory)
    assert torch.equal(child(BATCH), cut(model, chosen(by_magnitude(model), sizes))(BATCH))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    assert isinstance(theirs, transformers.Qwen2ForCausalLM)
    logits = torch.cat([theirs(ids[None]).logits[0] for ids in BATCH.input_ids.split(BATCH.lengths)])
    torch.testing.assert_close(child.logits(child(BATCH)), logits, rtol=1e-4, atol=1e-4)
    assert Tokenizer.load(directory).fingerprint == Tokenizer.load(parent / "model").fingerprint
    for name in ("generation_config.json", "tokenizer.json"):
        assert (directory / name).read_text() == (parent / "model" / name).read_text()
    assert (child.config.intermediate_size, child.config.hidden_size, child.config.num_attention_heads) == (40, 24, 2)


@pytest.fixture(scope="module")
def masked(parent, prepared, tokenizer_artifact, settings, context_of):
    objective = PruningMasksConfig(intermediate_size=16)
    inputs = {"starts_from": parent, "data": prepared["text"], "tokenizer": tokenizer_artifact}
    context = context_of(settings(tokens=6000, objective=objective), inputs)
    result = train.run(context)
    return context.output, result


def test_masks_are_learnt_then_cut(masked, context_of):
    """What the stage leaves is the masked model; the child is that model with the units of the largest scores alone."""
    artifact, result = masked
    assert result.metrics["masks/budget"] == pytest.approx(16, rel=1e-3)
    assert 0.5 < result.metrics["masks/hardness"] <= 1
    lines = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    budgets = [line["masks/budget"] for line in lines if "masks/budget" in line]
    assert budgets[0] > 50
    assert all(later < before + 1e-3 for before, later in itertools.pairwise(budgets))

    context = context_of(given(MasksConfig(), intermediate_size=16), {"starts_from": artifact})
    prune.run(context)
    child = Transformer.from_pretrained(context.output / "model")
    units = torch.tensor(json.loads((context.output / "kept.json").read_text())["units"])
    whole = Transformer.from_pretrained(artifact / "model")
    with torch.no_grad():
        for layer, stay in zip(whole.layers, units, strict=True):
            gone = torch.ones(64, dtype=torch.bool).index_fill(0, stay, False)
            # what goes is what is masked most: the folded columns are its weights times its mask
            norms = layer.mlp.down_proj.weight.norm(dim=0)
            assert norms[gone].mean() < 0.3 * norms[stay].mean()
            layer.mlp.down_proj.weight[:, gone] = 0
        torch.testing.assert_close(child.logits(child(BATCH)), whole.logits(whole(BATCH)), rtol=1e-4, atol=1e-4)
    assert torch.equal(child(BATCH), cut(whole, Kept(units=units))(BATCH))


def test_a_model_without_masks_is_refused(parent, context_of):
    with pytest.raises(UserError, match=r"starts_from: .* has learnt no masks\. Name a stage whose objective"):
        prune.run(context_of(given(MasksConfig(), intermediate_size=16), {"starts_from": parent}))


def test_the_tokens_it_measures_decide_nothing_else(parent, prepared, tokenizer_artifact, data_config, context_of):
    """Micro-batches of any size measure the same."""
    kept = []
    for budget in (64, 512):
        inputs = {"starts_from": parent, "data": prepared["text"], "tokenizer": tokenizer_artifact}
        settings = given(ActivationConfig(), data_config("text"), intermediate_size=8)
        context = context_of(settings, inputs)
        context = dataclasses.replace(context, compute=dataclasses.replace(context.compute, micro_batch_tokens=budget))
        prune.run(context)
        kept.append(json.loads((context.output / "kept.json").read_text()))
    assert kept[0] == kept[1]
    assert read_config(context.output / "model").intermediate_size == 8
