"""Any family through the recipe that is there: a real run of its first stage, at a size of seconds."""

from __future__ import annotations

import pytest
import torch

from lightning_llm import compose, plan, run
from lightning_llm.models.families import read_config

CLASSES = {
    "afm_on_device": "Qwen3ForCausalLM",
    "gemma2_2b": "Gemma2ForCausalLM",
    "llama3_1_8b": "LlamaForCausalLM",
}


@pytest.mark.slow
@pytest.mark.parametrize("model", CLASSES)
def test_a_family_is_trained_and_opens_as_its_class(model, tiny, tmp_path):
    import transformers

    place = [f"store.root={tmp_path}/artifacts", f"runs={tmp_path}/runs"]
    recipe = compose("qwen2", overrides=[*tiny, f"model={model}", *place])
    record = run(recipe, until="pretrain")
    metrics = record.stages["pretrain"]["metrics"]
    assert 1 < metrics["perplexity/web"] < 400  # 512 before the first step
    directory = record.folder / "artifacts" / "pretrain" / "model"
    shape = next(node.settings.model for node in plan(recipe).nodes if node.name == "pretrain")
    kept = read_config(directory)
    assert (kept.family, kept.rope_parameters) == (shape.family, shape.rope_parameters)
    assert [kept.layer_attention(i) for i in range(2)] == [shape.layer_attention(i) for i in range(2)]
    theirs = getattr(transformers, CLASSES[model]).from_pretrained(directory, attn_implementation="eager")
    ids = torch.tensor([[1, 2, 3, 4] * 20])
    assert theirs(ids, labels=ids).loss.isfinite()
