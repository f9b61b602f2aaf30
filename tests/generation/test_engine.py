"""Generation with the cache against none, and against transformers' own."""

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import generate
from lightning_llm.models import ModelConfig, Transformer


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        name="tiny",
        vocab_size=43,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 43, (n,), generator=generator).tolist() for n in (3, 1, 17, 4, 4, 30, 9, 2, 12, 5, 1)]


@torch.no_grad()
def without_cache(model, prompt, max_new_tokens, stop_ids):
    response = []
    while len(response) < max_new_tokens and not set(response[-1:]) & stop_ids:
        hidden = model(SegmentBatch.from_documents([prompt + response]))
        response.append(model.logits(hidden[-1]).argmax().item())
    return response


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_is_the_argmax_without_a_cache(model, prompts, batch_size):
    stop_ids = {7, 19}
    expected = [without_cache(model, prompt, 20, stop_ids) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=20, stop_ids=stop_ids, batch_size=batch_size) == expected
    lengths = [len(response) for response in expected]
    assert min(lengths) < 10  # rows leave the cache,
    assert max(lengths) == 20  # and others run on


def test_greedy_is_transformers(model, prompts, tmp_path):
    from transformers import Qwen2ForCausalLM, logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model.save_pretrained(tmp_path, eos_token_ids=[7, 19])
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = generate(model, prompts, max_new_tokens=16, stop_ids=[7, 19])
    for prompt, response in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert out[0, len(prompt) :].tolist() == response


def test_a_sample_does_not_depend_on_its_batch(model, prompts):
    def sample(top_p=1.0, **options):
        return generate(model, prompts, max_new_tokens=12, stop_ids={7}, sampling=Sampling(0.8, top_p=top_p), **options)

    assert sample(batch_size=3, seed=5) == sample(batch_size=11, seed=5)
    assert sample(seed=5, top_p=0.9) == sample(seed=5, top_p=0.9, batch_size=2)
    assert sample(seed=5) != sample(seed=6)


def test_equal_prompts_have_samples_of_their_own(model):
    responses = generate(model, [[1, 2, 3]] * 20, max_new_tokens=8, stop_ids=(), sampling=Sampling(1.0))
    assert len(set(map(tuple, responses))) > 15


def test_samples_follow_the_models_distribution(model):
    with torch.no_grad():
        expected = model.logits(model(SegmentBatch.from_documents([[5, 6]]))[-1]).softmax(-1)
    drawn = generate(model, [[5, 6]] * 4000, max_new_tokens=1, stop_ids=(), sampling=Sampling(1.0), batch_size=4000)
    shares = torch.bincount(torch.tensor(drawn)[:, 0], minlength=43) / 4000
    torch.testing.assert_close(shares, expected, rtol=0, atol=4 * 0.5 / 4000**0.5)


def test_no_prompts_no_responses(model):
    assert generate(model, [], max_new_tokens=4, stop_ids=()) == []


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"batch_size": 0}, {"context": 1}, {"prompts": [[1], []]}])
def test_impossible_requests_are_refused(model, wrong):
    with pytest.raises(ValueError, match="at least"):
        generate(model, **{"prompts": [[1]], "max_new_tokens": 4, "stop_ids": (), **wrong})
