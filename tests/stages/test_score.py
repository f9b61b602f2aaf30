"""The stage score: each number stands where its token stands, and nothing depends on the packing."""

import numpy as np
import pytest
import torch

from lightning_llm.data.packing import StageData
from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.settings import UserError
from lightning_llm.stages import score
from lightning_llm.stages.config import ComputeConfig, ScoreSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = ModelConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = Transformer(config)
    model.reset_parameters(0)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return model, directory


@pytest.fixture
def scored(model, prepared, context_of):
    def make(form, context=64, micro_batch_tokens=256, splits=("train", "validation")):
        settings = ScoreSettings(context, list(splits), "fp32")
        inputs = {"model": model[1], "data": prepared[form]}
        stage = context_of(settings, inputs, compute=ComputeConfig(micro_batch_tokens=micro_batch_tokens))
        return stage.output, score.run(stage)

    return make


def logps(folder, source, split="train"):
    return np.fromfile(folder / source / split / "logps.bin", np.float32)


def plainly(model, ids):
    """Log-probability of every token of a sequence but the first, from all its logits at once."""
    from lightning_llm.batch import SegmentBatch

    with torch.no_grad():
        table = model.logits(model(SegmentBatch.from_documents([ids]))).log_softmax(-1)
    return table[:-1].gather(1, torch.tensor(ids[1:].astype(np.int64))[:, None])[:, 0].numpy()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_pairs(model, prepared, scored, split):
    folder, _ = scored("pairs")
    values = logps(folder, "pairs", split)
    store = TokenStore.open(prepared["pairs"] / "sources" / "pairs" / split)
    assert len(values) == store.tokens
    for row in (0, store.rows - 1):
        prompt, chosen, rejected = store.row(row).segments
        got = values[store.token_slice(row)]
        expected = [np.zeros(len(prompt))]
        for response in (chosen, rejected):
            expected.append(plainly(model[0], np.concatenate([prompt, response]))[-len(response) :])
        np.testing.assert_allclose(got, np.concatenate(expected), atol=1e-4)


def test_documents_are_scored_in_pieces_of_the_context(model, prepared, scored):
    folder, result = scored("text", context=32)
    store = TokenStore.open(prepared["text"] / "sources" / "prose" / "train")
    row = int(np.argmax(store.row_lengths))
    assert store.row_lengths[row] > 64
    got, ids = logps(folder, "prose")[store.token_slice(row)], store.row(row).segments[0]
    assert got[0] == got[32] == got[64] == 0
    np.testing.assert_allclose(got[1:32], plainly(model[0], ids[:32]), atol=1e-4)
    np.testing.assert_allclose(got[33:64], plainly(model[0], ids[32:64]), atol=1e-4)
    every = np.concatenate(
        [logps(folder, source, split) for source in ("prose", "lists") for split in ("train", "validation")]
    )
    assert result.metrics["logps/mean"] == pytest.approx(every.sum() / (every != 0).sum(), rel=1e-4)
    assert result.ledger["prose"] == store.tokens + len(logps(folder, "prose", "validation"))


def test_only_what_the_assistant_said_is_scored(prepared, scored):
    folder, _ = scored("conversations")
    store = TokenStore.open(prepared["conversations"] / "sources" / "talks" / "train")
    assert store.is_target is not None
    np.testing.assert_array_equal(logps(folder, "talks") != 0, store.is_target)


def test_rows_beyond_the_context_are_left_at_zero(prepared, scored):
    store = TokenStore.open(prepared["pairs"] / "sources" / "pairs" / "train")
    context = int(np.median(store.row_contexts))
    folder, _ = scored("pairs", context=context)
    values = logps(folder, "pairs")
    for row in range(store.rows):
        assert values[store.token_slice(row)].any() == (store.row_contexts[row] <= context)


def test_the_packing_does_not_matter(scored):
    one, many = scored("pairs", micro_batch_tokens=1)[0], scored("pairs", micro_batch_tokens=4096)[0]
    np.testing.assert_allclose(logps(one, "pairs"), logps(many, "pairs"), atol=1e-4)


def test_training_finds_the_scores_of_its_targets(model, prepared, data_config, scored):
    folder, _ = scored("pairs")
    columns = {"reference_logps": folder}
    ramps = {"context_ramp": 64, "batch_ramp": 500, "total_tokens": 1000}
    data = StageData(prepared["pairs"], data_config("pairs"), **ramps, seed=0, token_columns=columns)
    (batch,) = data.window(0, micro_batch_tokens=10_000).mine
    from lightning_llm.objectives.base import token_logps

    with torch.no_grad():
        expected = token_logps(model[0], batch)
    counted = batch.target_mask
    torch.testing.assert_close(batch.columns["reference_logps"][counted], expected[counted], rtol=0, atol=1e-4)


def test_a_model_with_another_tokenizer_is_refused(model, prepared, tokenizer_artifact, context_of, tmp_path):
    model[0].save_pretrained(tmp_path)
    own = Tokenizer.load(tokenizer_artifact / "tokenizer")
    Tokenizer(own.backend, own.chat_template + "\n", own.settings).save(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer of the data \(sha .*\) is not that of the model"):
        score.run(context_of(ScoreSettings(64, ["train"], "fp32"), {"model": tmp_path, "data": prepared["pairs"]}))
