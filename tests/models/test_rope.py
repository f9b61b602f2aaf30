"""Rotary embeddings: the published angles, norms kept, only distances seen."""

import math

import pytest
import torch

from lightning_llm import compose
from lightning_llm.models.config import ModelConfig, set_rope_scaling, set_rope_theta
from lightning_llm.models.rope import attention_factor, inverse_frequencies, lengthened_theta, rotate, rotation


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


def test_the_law_gives_afms_base():
    """arXiv 2407.21075: from 500,000 at 8,192 tokens to 6,315,089 at 32,768; the recipe may refer to the figure."""
    assert round(lengthened_theta(500_000, 8192, 32_768)) == 6_315_089
    published = compose("qwen2", overrides=["model=afm_on_device"]).model
    assert published.published["long_context_rope_theta"] == 6_315_089
    assert published.rope_parameters["rope_theta"] == 500_000


@pytest.mark.parametrize(("theta", "context", "longer"), [(1e4, 2048, 8192), (5e5, 8192, 131_072), (1e6, 4096, 512)])
def test_as_many_pairs_make_a_whole_turn_in_a_longer_context(theta, context, longer):
    """The index at which theta^(-2i/D) T is 2 pi, as a share of all pairs; the way back leads back."""

    def last_turning(base, length):
        return math.log(length / (2 * math.pi)) / math.log(base)

    found = lengthened_theta(theta, context, longer)
    assert last_turning(found, longer) == pytest.approx(last_turning(theta, context), rel=1e-12)
    assert lengthened_theta(found, longer, context) == pytest.approx(theta, rel=1e-9)
    assert (found > theta) == (longer > context)


@pytest.mark.parametrize("wrong", [(1e4, 6, 512), (1e4, 512, 6), (1.0, 512, 1024)])
def test_no_base_without_a_turn(wrong):
    with pytest.raises(ValueError, match=r"at least 7 tokens|above 1"):
        lengthened_theta(*wrong)


def test_interpolation_is_a_slower_walk():
    """Position interpolation: position 12 stretched by 4 is position 3."""
    x = torch.randn(1, 1, 8)
    linear = inverse_frequencies({"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}, 8)
    torch.testing.assert_close(rotate(x, *rotation(torch.tensor([12]), linear)), turned(x, [3]))


def test_llama3_is_the_formula_by_wavelength():
    settings = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}
    got = inverse_frequencies(settings | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}, 128)
    between = 0
    for i in range(64):
        frequency = 5e5 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        expected = frequency / 8
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength < 8192:
            share = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - share) * frequency / 8 + share * frequency
            between += 1
        assert got[i].item() == pytest.approx(expected, rel=1e-5)
    assert between == 6  # known by hand: wavelengths from 2,048 to 8,192 are those of i = 28.2 to 35.0


@pytest.mark.parametrize(("theta", "length", "factor"), [(1e6, 32_768, 4.0), (1e4, 128, 8.0)], ids=["qwen 2", "short"])
def test_yarn_is_the_published_ramp(theta, length, factor):
    settings = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": length}
    got = inverse_frequencies(settings, 64)
    corner = [64 * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (32, 1)]
    low, high = max(math.floor(corner[0]), 0), min(math.ceil(corner[1]), 63)
    for i in range(32):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        expected = theta ** (-2 * i / 64) * ((1 - ramp) + ramp / factor)
        assert got[i].item() == pytest.approx(expected, rel=1e-5)
    assert attention_factor(settings) == pytest.approx(0.1 * math.log(factor) + 1)
    assert attention_factor(settings | {"attention_factor": 2.0}) == 2.0
    cos, sin = rotation(torch.tensor([3]), got, attention_factor(settings))
    assert (cos**2 + sin**2).mean().item() == pytest.approx(attention_factor(settings) ** 2, rel=1e-5)


def test_what_yarn_may_have_is_the_references():
    """Frequencies and factor of transformers' own function, for every way to give its keys."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "rope_theta": 3e4, "factor": 6.0, "original_max_position_embeddings": 900}
    seen = set()
    for more in (
        {},
        {"truncate": False},
        {"truncate": False, "beta_fast": 9.5, "beta_slow": 0.7},
        {"truncate": False, "original_max_position_embeddings": 6},  # both ends below the first index
        {"mscale": 0.7},
        {"mscale": 0.7, "mscale_all_dim": 1.9},
        {"mscale": 0.7, "mscale_all_dim": 1.9, "attention_factor": 1.3},
        {"mscale": 0.7, "mscale_all_dim": 1.9, "factor": 0.5},
    ):
        config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=yarn | more)
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
        torch.testing.assert_close(inverse_frequencies(yarn | more, 64), frequencies, rtol=1e-6, atol=0)
        assert attention_factor(yarn | more) == pytest.approx(factor, rel=1e-12)
        seen.add((tuple(frequencies.tolist()), factor))
    assert len(seen) == 7  # one mscale alone changes nothing, everything else does
    with pytest.raises(ValueError, match="truncate must be true or false, got 0"):
        ModelConfig(name="m", rope_parameters=yarn | {"truncate": 0})


def test_yarn_on_a_length_too_short_for_a_ramp_is_a_step():
    settings = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 6}
    plain = inverse_frequencies({"rope_theta": 1e4}, 64)
    stretch = plain / inverse_frequencies(settings, 64)
    torch.testing.assert_close(stretch, torch.tensor([1.0] + [8.0] * 31))


def test_a_stretch_leaves_the_base():
    before = ModelConfig(name="m", rope_parameters={"rope_type": "default", "rope_theta": 3e4})
    after = set_rope_scaling(before, {"rope_type": "linear", "factor": 8.0})
    assert after.rope_parameters == {"rope_type": "linear", "rope_theta": 3e4, "factor": 8.0}
    assert set_rope_theta(after, 7.0).rope_parameters["factor"] == 8.0
    with pytest.raises(ValueError, match="low_freq_factor must be below high_freq_factor"):
        set_rope_scaling(before, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 64})  # fmt: skip
