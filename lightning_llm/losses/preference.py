"""Losses on preference pairs: sequence log-probabilities in, one loss per pair out. Nothing is averaged here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

PerPair: TypeAlias = Float[Tensor, "pairs"]


def dpo_loss(
    policy_chosen: PerPair,
    policy_rejected: PerPair,
    reference_chosen: PerPair,
    reference_rejected: PerPair,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PerPair:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7; label noise: Mitchell 2023).

    With r = log policy - log reference, m = r(chosen) - r(rejected) and label noise e:
        loss = -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)

    Args:
        policy_chosen, policy_rejected: log-probabilities summed over the response, in nats.
        reference_chosen, reference_rejected: the same under the frozen reference; no gradient.
        beta: strength of the pull towards the reference, > 0. Llama 3 uses 0.1 (section 4.1.4).
        label_smoothing: share of pairs assumed to be labelled the wrong way round, in [0, 0.5).

    Returns:
        Loss of each pair in nats; log 2 wherever policy and reference agree.

    Raises:
        ValueError: beta or label_smoothing is out of range.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    margin = _positive(beta) * _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def ipo_loss(
    policy_chosen: PerPair,
    policy_rejected: PerPair,
    reference_chosen: PerPair,
    reference_rejected: PerPair,
    *,
    beta: float,
) -> PerPair:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    With r = log policy - log reference and m = r(chosen) - r(rejected):
        loss = (m - 1 / (2 beta))^2

    Args:
        policy_chosen, policy_rejected: log-probabilities summed over the response, in nats.
        reference_chosen, reference_rejected: the same under the frozen reference; no gradient.
        beta: strength of the pull towards the reference, > 0; the paper's tau. The margin it aims at is 1 / (2 beta).

    Returns:
        Loss of each pair in nats squared.

    Raises:
        ValueError: beta is out of range.
    """
    margin = _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return (margin - 1 / (2 * _positive(beta))) ** 2


def chosen_nll(policy_chosen: PerPair, chosen_lengths: Int[Tensor, "pairs"] | PerPair) -> PerPair:
    """Negative log-likelihood of the chosen response, per token, which keeps it likely while DPO looks at margins only.

        loss = -log policy(chosen) / length(chosen)

    Llama 3 adds 0.2 of it to DPO (arXiv 2407.21783, section 4.1.4, after Pang et al. 2024, arXiv 2404.19733, eq. 2,
    whose normalisation by length is used here).

    Args:
        policy_chosen: log-probabilities summed over the response, in nats, formatting tokens included.
        chosen_lengths: the tokens summed over. A response without any costs nothing.
    """
    return -policy_chosen / chosen_lengths.clamp(min=1)


def formatting_mask(target_ids: Int[Tensor, "targets"], formatting_ids: Iterable[int]) -> Bool[Tensor, "targets"]:
    """True where the target is a formatting token, a turn's header or its end.

    Llama 3 leaves them out of both log-ratios of DPO: chosen and rejected share them, so that they are pulled up and
    down at once (arXiv 2407.21783, section 4.1.4).
    """
    ids = torch.tensor(sorted(formatting_ids), dtype=target_ids.dtype, device=target_ids.device)
    return torch.isin(target_ids, ids)


def _margin(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> Tensor:
    return (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)


def _positive(beta: float) -> float:
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return beta
