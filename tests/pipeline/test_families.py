"""Any family through the recipe that is there: a real run of its first stage, at a size of seconds."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_llm import cli, compose, plan, run
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.models.families import read_config
from lightning_llm.settings import UserError

CLASSES = {
    "afm_on_device": "Qwen3ForCausalLM",
    "gemma2_2b": "Gemma2ForCausalLM",
    "llama3_1_8b": "LlamaForCausalLM",
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.family=gpt"], "family: 'gpt' is not built yet. Built are: qwen2, qwen3"),
        (["model.qk_norm=true"], "qk_norm: is True, but Qwen2ForCausalLM always has False"),
        (["model=qwen2_57b_a14b", "model.num_experts=0"], "num_experts: is 0 in family qwen2_moe"),
        (["model=gemma2_2b", "model.layer_types=[full_attention]"], "sliding_window is .*, and no layer uses it"),
        (
            ["model=llama3_1_8b", "model.hidden_size=100", "model.head_dim=6", "model.num_attention_heads=8"],
            "hidden_size: 100 is no multiple of num_attention_heads",
        ),
    ],
)
def test_a_model_that_no_family_has_is_refused_in_the_plan(overrides, message):
    with pytest.raises(UserError, match=message):
        plan(compose("qwen2", overrides=overrides))


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


@pytest.mark.slow
def test_gemma_2_goes_through_all_stages_and_speaks(tiny, tmp_path, monkeypatch, capsys):
    """With its window, soft-caps, post norms and scaled embedding, to the reply of the last stage's artifact."""
    import transformers

    place = [f"store.root={tmp_path}/artifacts", f"runs={tmp_path}/runs"]
    record = run(compose("qwen2", overrides=[*tiny, "model=gemma2_2b", *place]))
    stages = record.stages
    for stage, source in (("pretrain", None), ("long_context", "pretrain"), ("sft", "long_context"), ("dpo", "sft")):
        kept = read_config(record.artifact(stage) / "model")
        assert (kept.family, kept.attn_logit_softcapping, kept.final_logit_softcapping) == ("gemma2", 50.0, 30.0)
        windows = [kept.layer_attention(layer).window for layer in range(2)]
        assert 0 < windows[0] < kept.max_position_embeddings, stage
        assert windows[1] is None
        facts = json.loads((record.artifact(stage) / "stage.json").read_text())
        assert facts["inputs"].get("starts_from", {}).get("key") == (source and stages[source]["key"])
    assert stages["sft"]["metrics"]["loss"] < 5  # log 512 = 6.2 before the first step
    assert stages["dpo"]["metrics"]["rewards/margins"] > 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    words = ["model=dpo", f"store.root={tmp_path}/artifacts", "prompt=reverse 12", "template=chat"]
    assert cli.command(["generate", *words, "max_new_tokens=24", "format=jsonl"]) == 0
    said = capsys.readouterr()
    assert said.err == "note: attention by sdpa (the fastest on a CPU, and trains), new tokens by torch's products\n"
    reply = json.loads(said.out)
    theirs = transformers.Gemma2ForCausalLM.from_pretrained(
        record.artifact("dpo") / "model", attn_implementation="eager"
    )
    tokenizer = Tokenizer.load(record.artifact("dpo") / "model")
    prompt = tokenizer.render([{"role": "user", "content": "reverse 12"}], add_generation_prompt=True)
    ids = torch.tensor([prompt.ids])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    new = expected[0, ids.shape[1] :].tolist()
    assert reply["reply"] == tokenizer.decode([token for token in new if token not in tokenizer.stop_ids])
