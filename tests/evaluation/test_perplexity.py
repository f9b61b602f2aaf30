"""Perplexity, loss by position and the worth of a long context, on a model whose losses are known by other means."""

import math
import statistics

import numpy as np
import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.token_store import TokenStore, TokenStoreWriter
from lightning_llm.evaluation import perplexity
from lightning_llm.models import ModelConfig, Transformer

VOCABULARY = 50


def test_a_loss_beyond_all_floats_is_an_infinite_perplexity():
    assert perplexity.perplexity(math.log(20)) == pytest.approx(20)
    assert perplexity.perplexity(710.0) == math.inf
    assert math.isnan(perplexity.perplexity(math.nan))


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        name="tiny",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.3,  # far from uniform, so that a token's context matters
    )
    model = Transformer(config).eval()
    model.reset_parameters(0)
    return model


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def documents(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCABULARY, length) for length in lengths]


def plain_losses(model: Transformer, document: np.ndarray) -> torch.Tensor:
    """Loss of every token but the first, from dense logits of the document alone."""
    logits = model.logits(model(SegmentBatch.from_documents([document]))).double()
    return torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(document[1:]), reduction="none")


def store(directory, lengths, seed=0) -> TokenStore:
    writer = TokenStoreWriter(directory, "text", VOCABULARY)
    for document in documents(*lengths, seed=seed):
        writer.append([document.tolist()])
    writer.close()
    return TokenStore.open(directory)


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_mean_loss_weighs_tokens_and_not_batches(model, max_tokens):
    texts = documents(5, 37, 2, 16)
    pieces = [text[begin : begin + 8] for text in texts for begin in range(0, len(text), 8)]
    pieces = [*(piece for piece in pieces if len(piece) > 1)]
    expected = torch.cat([plain_losses(model, piece) for piece in pieces]).mean()
    assert perplexity.mean_loss(model, texts, 8, max_tokens).compute().item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(model):
    uniform = Transformer(model.config).eval()
    for parameter in uniform.parameters():
        parameter.zero_()
    loss = perplexity.mean_loss(uniform, documents(30, 30), 16, 100).compute()
    assert math.exp(loss) == pytest.approx(VOCABULARY, rel=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 64, 1000])
def test_losses_by_position_are_those_of_each_window_alone(model, max_tokens):
    windows = documents(24, 24, 24)
    losses = perplexity.losses_by_position(model, windows, max_tokens)
    assert losses.shape == (3, 23)
    expected = torch.stack([plain_losses(model, window) for window in windows])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("length", "ends"),
    [(40, [*range(40, 20, -4)]), (17, [17]), (25, [25, 21, 17])],
    ids=["many", "one", "uneven"],
)
def test_late_loss_scores_the_same_tokens_twice(model, length, ends):
    windows, short = documents(length, length, seed=1), 16
    losses = perplexity.losses_by_position(model, windows, 1000)
    late = perplexity.late_loss(model, windows, losses, short, 1000)
    full_losses = torch.stack([plain_losses(model, window)[end - 5 : end - 1] for window in windows for end in ends])
    short_losses = torch.stack([plain_losses(model, window[end - 16 : end])[-4:] for window in windows for end in ends])
    assert late.full == pytest.approx(full_losses.mean().item(), rel=1e-4)
    assert late.short == pytest.approx(short_losses.mean().item(), rel=1e-4)
    assert late.gain == pytest.approx((short_losses - full_losses).mean().item(), rel=1e-3)
    of_windows = (short_losses - full_losses).unflatten(0, (2, len(ends))).mean((1, 2)).tolist()
    assert late.gain_error == pytest.approx(statistics.stdev(of_windows) / math.sqrt(2), rel=1e-2)


def test_the_curve_covers_every_position_once():
    losses = torch.arange(1, 12.0).repeat(2, 1)  # the loss of the token at position p is p
    curve = perplexity.position_curve(losses)
    assert curve["begin"] == [1, 2, 3, 4, 6, 8]
    assert curve["end"] == [2, 3, 4, 6, 8, 12]
    assert curve["loss"] == [1.0, 2.0, 3.0, 4.5, 6.5, 9.5]


def test_text_is_sampled_from_the_beginnings_of_many_documents(tmp_path):
    chosen = perplexity.sample_text(store(tmp_path, [1000, *[50] * 30]), 400)
    assert [len(document) for document in chosen] == [50] * 8  # the long one gives an eighth, as any other at most
    assert sum(map(len, chosen)) == 400


def test_little_text_is_taken_as_it_is(tmp_path):
    assert [len(document) for document in perplexity.sample_text(store(tmp_path, [20, 30]), 400)] == [20, 30]


def test_windows_come_from_long_documents_of_all_domains(tmp_path):
    stores = {"code": store(tmp_path / "code", [100, 9, 30, 35]), "web": store(tmp_path / "web", [25, 5], seed=1)}
    windows = perplexity.sample_windows(stores, 10, 3)
    code, web = documents(100, 9, 30, 35), documents(25, 5, seed=1)
    np.testing.assert_array_equal(windows, [code[0][:10], web[0][:10], code[2][:10]])


def test_no_document_is_long_enough(tmp_path):
    assert perplexity.sample_windows({"web": store(tmp_path, [8, 9])}, 10, 3) == []
