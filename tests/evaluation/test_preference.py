"""Accuracy on pairs, log-probabilities of responses, and the divergence from the reference."""

import numpy as np
import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.token_store import TokenStore, TokenStoreWriter
from lightning_llm.evaluation.preference import kl_to_reference, preference_accuracy, response_logps, sample_pairs
from lightning_llm.models import ModelConfig, Transformer


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        name="tiny",
        vocab_size=20,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.3,
    )
    model = Transformer(config).eval()
    model.reset_parameters(0)
    return model


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
@torch.inference_mode()
def test_response_logps_are_those_of_prompt_and_response_together(model, max_tokens):
    prompts = [[1, 2, 3], [4], [5, 6]]
    responses = [[[7, 8], [9]], [[10, 11, 12], [13, 14]], [[1], [2, 3, 4, 5]]]
    got = response_logps(model, prompts, responses, max_tokens)
    for i, prompt in enumerate(prompts):
        for j, response in enumerate(responses[i]):
            whole = torch.tensor(prompt + response)
            logits = model.logits(model(SegmentBatch.from_documents([whole.numpy()]))).double()
            logps = logits.log_softmax(-1)[:-1].gather(1, whole[1:, None])[:, 0]
            assert got[i, j].item() == pytest.approx(logps[-len(response) :].sum().item(), rel=1e-4)


def test_accuracy_counts_a_tie_one_half():
    scores = torch.tensor([[-1.0, -2.0], [-3.0, -3.0], [-5.0, -4.0], [0.5, -0.5]])
    assert preference_accuracy(scores) == 0.625


def test_a_policy_that_is_its_reference_prefers_nothing():
    logps = torch.randn(9, 2)
    assert preference_accuracy(logps - logps) == 0.5
    assert kl_to_reference(logps[:, 0], logps[:, 0]) == 0.0


def test_kl_is_the_divergence_of_known_distributions():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    drawn = torch.multinomial(policy, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    exact = (policy * (policy / reference).log()).sum().item()
    assert kl_to_reference(policy.log()[drawn], reference.log()[drawn]) == pytest.approx(exact, rel=0.02)


def test_pairs_that_do_not_fit_are_left_out(tmp_path):
    writer = TokenStoreWriter(tmp_path, "pairs", 100)
    for prompt, chosen, rejected in (([1, 2], [3], [4]), ([1] * 9, [3], [4]), ([5], [6, 7], [8]), ([9], [9], [9])):
        writer.append([prompt, chosen, rejected], [[False] * len(prompt), [True] * len(chosen), [True] * len(rejected)])
    writer.close()
    pairs = sample_pairs(TokenStore.open(tmp_path), 2, 6)
    assert [pair.prompt.tolist() for pair in pairs] == [[1, 2], [5]]
    assert [np.asarray(response).tolist() for response in pairs[1].responses] == [[6, 7], [8]]
