"""The adapter against a fake of vLLM's documented classes, behind which our own engine speaks. vLLM is not run here."""

import sys
from types import SimpleNamespace

import pytest

from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import sample
from lightning_llm.generation.vllm import VLLMSampler
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.settings import UserError


class SamplingParams:
    """The documented arguments that matter here; any other is a TypeError, as it would be there."""

    def __init__(
        self, *, n, temperature, top_k, top_p, min_p, repetition_penalty, seed, max_tokens, stop_token_ids, ignore_eos,
        logprobs, detokenize,
    ):  # fmt: skip
        assert (n, ignore_eos, logprobs, detokenize) == (1, True, 0, False)
        self.sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        self.seed, self.max_tokens, self.stop_token_ids = seed, max_tokens, stop_token_ids


class LLM:
    """Answers request by request with our own engine."""

    def __init__(self, *, model, dtype, max_model_len, skip_tokenizer_init, **options):
        assert skip_tokenizer_init
        assert options["logprobs_mode"] == "processed_logprobs"
        self.model = Transformer.from_pretrained(model)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert not use_tqdm
        answers = []
        for prompt, asked in zip(prompts, sampling_params, strict=True):
            [found] = sample(
                self.model, [prompt["prompt_token_ids"]], max_new_tokens=asked.max_tokens,
                stop_ids=asked.stop_token_ids, sampling=asked.sampling, seed=asked.seed,
            )  # fmt: skip
            if not asked.sampling.temperature:  # there a greedy token has the log-probability of a softmax
                found.logps = [-1.5] * len(found.ids)
            logprobs = [{id: SimpleNamespace(logprob=logp)} for id, logp in zip(found.ids, found.logps, strict=True)]
            answers.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(found.ids), logprobs=logprobs)]))
        return answers


@pytest.fixture
def directory(tmp_path):
    config = ModelConfig(
        name="tiny", vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip
    model = Transformer(config)
    model.reset_parameters(0)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_the_interface_is_the_engines(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
    sampler = VLLMSampler(directory, context=40)
    prompts = [[1, 2, 3], [9] * 30, [4]]
    greedy = sampler.sample(prompts, max_new_tokens=20, stop_ids={7, 19})
    model = Transformer.from_pretrained(directory)
    expected = sample(model, prompts, max_new_tokens=20, stop_ids={7, 19}, context=40)
    assert greedy == expected
    assert {logp for each in greedy for logp in each.logps} == {0.0}  # of what was drawn from: nothing else could come
    assert len(greedy[1].ids) <= 10
    options = {"max_new_tokens": 6, "stop_ids": (), "samples": 4, "sampling": Sampling(0.9, 20, 0.9, 0.01)}
    drawn = sampler.sample(prompts, seed=1, **options)
    assert len({tuple(each.ids) for each in drawn[:4]}) == 4  # each response has a seed of its own
    assert drawn == sampler.sample(prompts, seed=1, **options) != sampler.sample(prompts, seed=2, **options)
    assert all(logp < 0 for each in drawn for logp in each.logps)
    options["samples"], numbers = 2, [2, 3, 6, 7, 10, 11]  # the second half of each prompt's
    assert sampler.sample(prompts, seed=1, numbers=numbers, **options) == [drawn[number] for number in numbers]
    assert sampler.sample([], max_new_tokens=4, stop_ids=()) == []


def test_what_is_not_installed_says_so(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vllm cannot be imported"):
        VLLMSampler(directory)
