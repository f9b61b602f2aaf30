"""Generation with the cache against none, and against transformers' own."""

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.generation import engine
from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import generate, sample
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


def test_whoever_samples_a_share_draws_what_the_whole_would(model, prompts):
    options = {"max_new_tokens": 9, "stop_ids": {7}, "sampling": Sampling(1.0), "samples": 2, "seed": 5}
    whole = generate(model, prompts, **options)
    numbers = [number for prompt in range(1, len(prompts), 3) for number in (2 * prompt, 2 * prompt + 1)]
    assert generate(model, prompts[1::3], numbers=numbers, **options) == [whole[number] for number in numbers]


def test_equal_prompts_have_samples_of_their_own(model):
    responses = generate(model, [[1, 2, 3]] * 20, max_new_tokens=8, stop_ids=(), sampling=Sampling(1.0))
    assert len(set(map(tuple, responses))) > 15


def test_samples_follow_the_models_distribution(model):
    with torch.no_grad():
        expected = model.logits(model(SegmentBatch.from_documents([[5, 6]]))[-1]).softmax(-1)
    drawn = generate(model, [[5, 6]] * 4000, max_new_tokens=1, stop_ids=(), sampling=Sampling(1.0), batch_size=4000)
    shares = torch.bincount(torch.tensor(drawn)[:, 0], minlength=43) / 4000
    torch.testing.assert_close(shares, expected, rtol=0, atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_places_are_filled_again(model, prompts, batch_size):
    """Responses of all lengths, in fewer places than there are; each is what it would be alone."""
    limits = [1, 9, 3, 30, 2, 5, 5, 14, 1, 7, 20]
    alone = [without_cache(model, prompt, n, {7}) for prompt, n in zip(prompts, limits, strict=True)]
    assert generate(model, prompts, max_new_tokens=limits, stop_ids={7}, batch_size=batch_size) == alone


@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_samples_of_a_prompt_are_those_of_its_copies(model, prompts, batch_size, monkeypatch):
    computed = []
    prefill = engine.prefill

    def counted(model, cache, prompts, copies):
        computed.extend(prompts)
        return prefill(model, cache, prompts, copies)

    monkeypatch.setattr(engine, "prefill", counted)
    options = {"max_new_tokens": 9, "stop_ids": {7}, "sampling": Sampling(1.0, top_p=0.95), "seed": 3}
    found = sample(model, prompts[:4], samples=5, batch_size=batch_size, **options)
    assert len(computed) == (8 if batch_size == 3 else 4)  # once for those that have a place at the same time
    copies = [prompt for prompt in prompts[:4] for _ in range(5)]
    assert [response.ids for response in found] == generate(model, copies, **options)
    assert len({tuple(response.ids) for response in found[:5]}) == 5


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7), Sampling(1.2, top_k=5), Sampling(1.0, top_p=0.8)])
def test_log_probabilities_are_those_of_what_was_drawn_from(model, prompts, sampling):
    """Against the whole text at once and the cut distribution, renormalised."""
    found = sample(model, prompts, max_new_tokens=6, stop_ids=(), sampling=sampling, seed=1)
    for prompt, response in zip(prompts, found, strict=True):
        with torch.no_grad():
            hidden = model(SegmentBatch.from_documents([prompt + response.ids]))
            logits = model.logits(hidden[len(prompt) - 1 : -1]) / sampling.temperature
        probabilities, order = logits.double().softmax(-1).sort(descending=True)
        kept = torch.ones_like(probabilities, dtype=torch.bool)
        if sampling.top_k:
            kept[:, sampling.top_k :] = False
        kept &= probabilities.cumsum(-1) - probabilities < sampling.top_p
        cut = torch.zeros_like(probabilities).scatter(-1, order, probabilities * kept)
        expected = (cut / cut.sum(-1, keepdim=True)).log()[torch.arange(6), torch.tensor(response.ids)]
        torch.testing.assert_close(torch.tensor(response.logps).double(), expected, rtol=0, atol=1e-4)


def test_greedy_has_no_choice(model, prompts):
    assert {logp for response in sample(model, prompts, max_new_tokens=3, stop_ids=()) for logp in response.logps} == {
        0
    }


def test_no_prompts_no_responses(model):
    assert generate(model, [], max_new_tokens=4, stop_ids=()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"context": 1},
        {"prompts": [[1], []]},
        {"samples": 0},
        {"max_new_tokens": [4, 4]},
    ],
)
def test_impossible_requests_are_refused(model, wrong):
    with pytest.raises(ValueError, match="at least"):
        generate(model, **{"prompts": [[1]], "max_new_tokens": 4, "stop_ids": (), **wrong})


def test_stop_strings_end_responses_in_a_batch(model, prompts):
    """Each with the token that completes one, whatever runs beside it; a stop token counts before a string."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?-"
    options = {"max_new_tokens": 30, "sampling": Sampling(1.0), "seed": 4, "samples": 2}

    def decode_ids(ids):
        return "".join(letters[id] for id in ids)

    whole = sample(model, prompts, stop_ids={7}, **options)
    stops = [decode_ids(whole[0].ids[9:11]), decode_ids(whole[5].ids[3:4])]
    for batch_size in (4, 64):
        found = sample(
            model, prompts, stop_ids={7}, stops=stops, decode_ids=decode_ids, batch_size=batch_size, **options
        )
        for before, after in zip(whole, found, strict=True):
            text = decode_ids([id for id in before.ids if id != 7])
            ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
            assert after.ids == (before.ids[: min(ends)] if ends else before.ids)
            assert after.is_stopped == bool(ends)
        assert {response.is_stopped for response in found} == {True, False}


def test_stop_strings_need_a_text(model):
    with pytest.raises(ValueError, match="decode_ids"):
        sample(model, [[1]], max_new_tokens=1, stop_ids=(), stops=["a"])
