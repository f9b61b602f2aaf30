"""Sampling: the distribution it draws from, by counting; and that a request's randomness is its own."""

import pytest
import torch

from lightning_llm.generation.config import Sampling
from lightning_llm.generation.sampling import next_tokens, request_uniforms

LOGITS = torch.tensor([0.5, -1.0, 2.0, -torch.inf, 1.0])
GRID = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # every share of the unit interval alike


def shares(*sampling: float, **named: float) -> torch.Tensor:
    tokens = next_tokens(LOGITS.expand(len(GRID), -1), GRID, Sampling(*sampling, **named))
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
        assert next_tokens(logits, ends, Sampling(1.0, top_p=top_p)).tolist() == [1, 2]


def test_uniforms_belong_to_seed_and_request():
    assert torch.equal(request_uniforms(3, 5, seed=1), request_uniforms(3, 9, seed=1)[:5])
    drawn = {request_uniforms(request, 1, seed).item() for request in range(50) for seed in range(50)}
    assert len(drawn) == 2500
