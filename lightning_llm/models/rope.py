"""Rotary position embeddings: the angles of a batch once, then one rotation of queries and keys per layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def inverse_frequencies(rope_parameters: dict[str, Any], head_size: int, device: torch.device | None = None) -> Tensor:
    """theta^(-2i/D) for i = 0 .. D/2-1 (Su et al. 2021, arXiv 2104.09864), stretched as `rope_type` says.

    default: as it is. linear: divided by `factor` (position interpolation, Chen et al. 2023, arXiv 2306.15595).
    llama3, yarn: slow frequencies divided by it, fast ones kept; see below.

    Returns:
        float32 [D/2], radians per token.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    frequencies = 1.0 / rope_parameters["rope_theta"] ** exponents
    rope_type = rope_parameters.get("rope_type", "default")
    if rope_type == "default":
        return frequencies
    if rope_type == "linear":
        return frequencies / rope_parameters["factor"]
    kept = (kept_by_wavelength if rope_type == "llama3" else kept_by_yarn)(rope_parameters, frequencies)
    return frequencies * (kept + (1 - kept) / rope_parameters["factor"])


def lengthened_theta(theta: float, context: int, longer: int) -> float:
    """The base with which as many pairs as before make a whole turn within a longer context.

    theta' = theta^(ln(T' / 2 pi) / ln(T / 2 pi)), of contexts T and T' in tokens (Liu et al. 2023, arXiv 2310.05209:
    the critical dimension of a base and a length). With 500,000 and 8,192 to 32,768 tokens it is AFM's 6,315,089
    (arXiv 2407.21075), whose report prints the base and not the law.

    Raises:
        ValueError: a context is too short for a turn, or the base is none.
    """
    if min(context, longer) < 7:
        raise ValueError(f"contexts must have at least 7 tokens, more than 2 pi, got {context} and {longer}")
    if theta <= 1:
        raise ValueError(f"theta must be above 1, got {theta:g}")
    return theta ** (math.log(longer / (2 * math.pi)) / math.log(context / (2 * math.pi)))


def kept_by_wavelength(rope_parameters: dict[str, Any], frequencies: Tensor) -> Tensor:
    """Which share of each frequency Llama 3.1 leaves unstretched [D/2] (released code; the report is silent on it).

    With w = 2 pi / frequency and T the original length: 1 where w < T / high_freq_factor, 0 where
    w > T / low_freq_factor, in between linear in T / w.
    """
    low, high = rope_parameters["low_freq_factor"], rope_parameters["high_freq_factor"]
    turns = rope_parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # T / w
    return ((turns - low) / (high - low)).clamp(0, 1)


def kept_by_yarn(rope_parameters: dict[str, Any], frequencies: Tensor) -> Tensor:
    """Which share of each frequency YaRN leaves unstretched [D/2] (Peng et al. 2023, arXiv 2309.00071, section 3.2).

    1 where a pair turns more than beta_fast times over the original length T, 0 where fewer than beta_slow times, in
    between linear in the pair's index. The index with n turns is D ln(T / (2 pi n)) / (2 ln theta), rounded
    outwards at both ends unless `truncate` is false (released code).
    """
    head_size, theta = 2 * len(frequencies), rope_parameters["rope_theta"]

    def index_of(turns: float) -> float:
        length = rope_parameters["original_max_position_embeddings"]
        return head_size * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = (index_of(rope_parameters.get(*beta)) for beta in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    if rope_parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    indices = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    # on short lengths the two coincide: then a step, as in the released code
    return 1 - ((indices - first) / (last - first if last != first else 0.001)).clamp(0, 1)


def attention_factor(rope_parameters: dict[str, Any]) -> float:
    """What YaRN multiplies cosines and sines with, 0.1 ln(factor) + 1 (section 3.4); 1 for other types.

    Scores grow with its square: a softmax over a stretched context stays as sharp as it was. With `mscale` m and
    `mscale_all_dim` a, of which one alone counts for nothing: (0.1 m ln(factor) + 1) / (0.1 a ln(factor) + 1), as
    transformers takes them from DeepSeek's released code. `attention_factor` in the settings comes before both.
    """
    if rope_parameters.get("rope_type") != "yarn":
        return 1.0
    if "attention_factor" in rope_parameters:
        return rope_parameters["attention_factor"]
    growth = 0.1 * math.log(max(rope_parameters["factor"], 1.0))
    if {"mscale", "mscale_all_dim"} <= rope_parameters.keys():
        return (growth * rope_parameters["mscale"] + 1.0) / (growth * rope_parameters["mscale_all_dim"] + 1.0)
    return growth + 1.0


def rotation(positions: Tensor, inverse_frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every token's angles times `factor`, the same for all layers and heads.

    Returns:
        float32 [T, 1, D] each.
    """
    angles = positions[:, None, None] * inverse_frequencies  # [T, 1, D/2]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of [T, heads, D] by the token's angles, in float32; type of x kept."""
    exact = x.float()
    other_half = exact.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(other_half * sin, exact, cos).to(x.dtype)
