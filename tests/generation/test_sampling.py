"""Sampling: the distribution it draws from, by counting; and that a request's randomness is its own."""

import pytest
import torch

from lightning_llm.generation.config import Sampling
from lightning_llm.generation.sampling import next_tokens, request_uniforms

LOGITS = torch.tensor([0.5, -1.0, 2.0, -torch.inf, 1.0])
GRID = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # every share of the unit interval alike


def shares(*sampling: float, **named: float) -> torch.Tensor:
    tokens, _ = next_tokens(LOGITS.expand(len(GRID), -1), GRID, Sampling(*sampling, **named))
    return torch.bincount(tokens, minlength=5) / len(GRID)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_probability(temperature):
    torch.testing.assert_close(shares(temperature), (LOGITS / temperature).softmax(0), rtol=0, atol=2e-4)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    # probabilities .135 .030 .607 0 .223
    expected = LOGITS.softmax(0)
    for top_p, kept in ((0.5, [2]), (0.62, [2, 4]), (0.9, [0, 2, 4])):
        only = torch.zeros(5)
        only[kept] = expected[kept] / expected[kept].sum()
        torch.testing.assert_close(shares(1.0, top_p=top_p), only, rtol=0, atol=2e-4)


def test_temperature_zero_takes_the_largest():
    assert shares(0.0, top_p=0.3).tolist() == [0, 0, 1, 0, 0]


def test_the_ends_of_the_interval_draw_possible_tokens():
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    logits = torch.tensor([-torch.inf, 1.0, 1.0, -torch.inf]).expand(2, -1)
    for top_p in (1.0, 0.99):
        assert next_tokens(logits, ends, Sampling(1.0, top_p=top_p))[0].tolist() == [1, 2]


def test_uniforms_belong_to_seed_and_request():
    assert torch.equal(request_uniforms(3, 5, seed=1), request_uniforms(3, 9, seed=1)[:5])
    drawn = {request_uniforms(request, 1, seed).item() for request in range(50) for seed in range(50)}
    assert len(drawn) == 2500
    large = 2**64 - 1
    assert torch.equal(request_uniforms(3, 5, seed=large), request_uniforms(3, 9, seed=large)[:5])
    assert 0.49 < torch.cat([request_uniforms(request, 20, large) for request in range(1000)]).mean() < 0.51


def test_no_bit_of_a_large_seed_is_lost():
    """Seeds that are equal modulo 2^32, and whatever else differs in one bit, share no numbers."""
    seeds = [2**63 + 1, *(2**63 + 1 + 2**bit for bit in range(1, 63))]
    drawn = {request_uniforms(request, 1, seed).item() for request in (0, 1, 2**31, 2**40) for seed in seeds}
    assert len(drawn) == 4 * len(seeds)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, top_k=4),
        Sampling(1.3, top_p=0.6),
        Sampling(1.0, min_p=0.2),
        Sampling(0.8, top_k=6, top_p=0.8, min_p=0.1),
        Sampling(1.0, top_k=1, top_p=0.1, min_p=1.0),
    ],
)
def test_what_is_drawn_from_is_what_transformers_draws_from(sampling):
    from transformers.generation import logits_process

    logits = 2 * torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    theirs = logits / sampling.temperature
    if sampling.top_k:
        theirs = logits_process.TopKLogitsWarper(sampling.top_k)(None, theirs)
    if sampling.top_p < 1:
        theirs = logits_process.TopPLogitsWarper(sampling.top_p)(None, theirs)
    if sampling.min_p:
        theirs = logits_process.MinPLogitsWarper(sampling.min_p)(None, theirs)
    for row, expected in zip(logits, theirs.softmax(-1), strict=True):
        tokens, logps = next_tokens(row.expand(len(GRID), -1), GRID, sampling)
        torch.testing.assert_close(torch.bincount(tokens, minlength=20) / len(GRID), expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(logps, expected.log()[tokens], rtol=0, atol=1e-5)


def test_the_penalty_is_the_papers():
    """A token that was said loses a fifth of a positive logit, and gets five quarters of a negative one."""
    logits = torch.tensor([[1.0, 0.85, -1.0], [-1.0, -1.1, -5.0]])
    said = torch.tensor([[True, False, False], [True, False, True]])
    assert next_tokens(logits, torch.zeros(2), Sampling(repetition_penalty=1.25), said)[0].tolist() == [1, 1]
    assert next_tokens(logits, torch.zeros(2), Sampling(repetition_penalty=1.05), said)[0].tolist() == [0, 0]
