"""Rotary embeddings: the published angles, norms kept, only distances seen."""

import math

import pytest
import torch

from lightning_llm.models.config import ModelConfig, set_rope_theta
from lightning_llm.models.rope import inverse_frequencies, rotate, rotation
from lightning_llm.settings import UserError


def turned(x: torch.Tensor, positions: list[int], theta: float = 100.0) -> torch.Tensor:
    frequencies = inverse_frequencies({"rope_type": "default", "rope_theta": theta}, x.shape[-1])
    return rotate(x, *rotation(torch.tensor(positions), frequencies))


def test_rotation_is_the_published_formula():
    x = torch.randn(1, 1, 6)
    expected = torch.empty(6)
    for i in range(3):
        angle = 7 * 100.0 ** (-2 * i / 6)
        first, second = x[0, 0, i].item(), x[0, 0, i + 3].item()
        expected[i] = first * math.cos(angle) - second * math.sin(angle)
        expected[i + 3] = first * math.sin(angle) + second * math.cos(angle)
    torch.testing.assert_close(turned(x, [7])[0, 0], expected)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    near = (turned(q, [9]) * turned(k, [4])).sum(-1)
    far = (turned(q, [1009]) * turned(k, [1004])).sum(-1)
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)


def test_a_larger_base_leaves_the_rest_of_the_model():
    before = ModelConfig(name="m", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    after = set_rope_theta(before, 1_000_000)
    assert after.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert set_rope_theta(after, 1e4) == before
    assert before.rope_parameters["rope_theta"] == 1e4


def test_types_that_are_not_built_are_refused():
    with pytest.raises(UserError, match="'yarn' is not built yet"):
        inverse_frequencies({"rope_type": "yarn", "rope_theta": 1e4}, 8)
