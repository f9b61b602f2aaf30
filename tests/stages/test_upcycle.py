"""The stage upcycle: a directory that transformers opens as Qwen2MoeForCausalLM, and which trains on."""

import dataclasses
import json

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.models import Transformer
from lightning_llm.models.upcycle import upcycle
from lightning_llm.stages import train
from lightning_llm.stages import upcycle as stage
from lightning_llm.stages.config import UpcycleSettings

BATCH = SegmentBatch.from_documents([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]])
FINE = UpcycleSettings(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=32,
    norm_topk_prob=False, router_aux_loss_coef=0.01, experts="slices", reinitialised=0.5, of="entries",
    keeps_scale=True, seed=2,
)  # fmt: skip
COPIES = dataclasses.replace(
    FINE, moe_intermediate_size=None, shared_expert_intermediate_size=None, norm_topk_prob=True, experts="copies"
)


@pytest.mark.parametrize("settings", [FINE, COPIES], ids=["slices", "copies"])
@torch.no_grad()
def test_transformers_opens_it(talker, context_of, settings):
    import transformers

    transformers.logging.disable_progress_bar()
    context = context_of(settings, {"starts_from": talker})
    result = stage.run(context)
    directory = context.output / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    assert isinstance(theirs, transformers.Qwen2MoeForCausalLM)
    mixture, dense = Transformer.from_pretrained(directory), Transformer.from_pretrained(talker)
    found = mixture.logits(mixture(BATCH))
    expected = torch.cat([theirs(ids[None]).logits[0] for ids in BATCH.input_ids.split(BATCH.lengths)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    same = torch.allclose(found, dense.logits(dense(BATCH)), rtol=1e-4, atol=1e-4)
    assert same == (settings is COPIES)
    options = {name: getattr(settings, name) for name in ("experts", "reinitialised", "of", "keeps_scale", "seed")}
    again = upcycle(dense, mixture.config, **options)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), mixture.parameters(), strict=True))
    assert Tokenizer.load(directory).fingerprint == Tokenizer.load(talker).fingerprint
    assert json.loads((directory / "generation_config.json").read_text()) == json.loads(
        (talker / "generation_config.json").read_text()
    )
    total = sum(parameter.numel() for parameter in mixture.parameters())
    idle = (4 - 2) * 3 * 32 * mixture.config.moe_intermediate_size * 2  # experts, matrices, width, layers
    assert result.metrics == {"parameters": total, "parameters/active": total - idle}


def test_it_trains_on(prepared, tokenizer_artifact, settings, context_of):
    inputs = {"data": prepared["text"], "tokenizer": tokenizer_artifact}
    dense = context_of(settings(tokens=3000), inputs)
    train.run(dense)
    mixture = context_of(FINE, {"starts_from": dense.output})
    stage.run(mixture)
    after = context_of(settings(tokens=3000), inputs | {"starts_from": mixture.output})
    result = train.run(after)
    first = json.loads((after.output / "metrics.jsonl").read_text().splitlines()[0])["validation/loss"]
    assert result.metrics["validation/loss"] < first
    assert result.metrics["router/aux_loss"] > 0
