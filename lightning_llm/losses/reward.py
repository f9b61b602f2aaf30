"""Losses of reward models: scores in, one loss per comparison out. Nothing is averaged here.

A score is a reward up to a constant of its prompt: only differences mean something.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

PerPair: TypeAlias = Float[Tensor, "pairs"]

# By strength of the preference: 1 negligibly, 2 slightly, 3 clearly, 4 significantly better.
PROBABILITIES = (0.65, 0.75, 0.85, 0.95)  # that the chosen response is better (AFM's report, on reward modelling)
MARGINS = {  # Llama 2, arXiv 2307.09288, section 3.2.2 and table 27
    "small": (0.0, 1 / 3, 2 / 3, 1.0),
    "large": (0.0, 1.0, 2.0, 3.0),
}
STRENGTHS = (1, 2, 3, 4)


def bradley_terry_loss(chosen: PerPair, rejected: PerPair, margin: PerPair | None = None) -> PerPair:
    """-log sigmoid(chosen - rejected - margin) (Bradley and Terry 1952; margin: Llama 2, eq. 2; Llama 3 has none).

    Args:
        chosen, rejected: scores.
        margin: by which the chosen response should be ahead; None: 0.

    Returns:
        Loss of each pair in nats.
    """
    ahead = chosen - rejected
    return -logsigmoid(ahead if margin is None else ahead - margin)


def soft_label_loss(chosen: PerPair, rejected: PerPair, probability: PerPair) -> PerPair:
    """Cross-entropy of sigmoid(chosen - rejected) with the probability that the chosen response is better.

    AFM's ranking loss: the probability follows the strength of the preference.

    loss = -p log sigmoid(c - r) - (1 - p) log sigmoid(r - c), smallest where c - r = logit(p).

    Raises:
        ValueError: a probability outside (0, 1).
    """
    if not ((probability > 0) & (probability < 1)).all():
        raise ValueError("probabilities lie in (0, 1)")
    ahead = chosen - rejected
    return -probability * logsigmoid(ahead) - (1 - probability) * logsigmoid(-ahead)


def ranked_loss(best: PerPair, middle: PerPair, worst: PerPair) -> PerPair:
    """Mean Bradley-Terry loss over the three pairs of an order (Llama 3, section 4.1.2: edited > chosen > rejected; how
    the pairs are weighed is ours)."""
    pairs = ((best, middle), (middle, worst), (best, worst))
    return torch.stack([bradley_terry_loss(better, worse) for better, worse in pairs]).mean(dim=0)


def grading_loss(logits: Float[Tensor, "*n classes"], grades: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Cross-entropy of a human's grades of single responses: AFM's regulariser, one head for each thing graded.

    Args:
        logits: of each grade.
        grades: from 0; negative where nobody has graded, which costs nothing.
    """
    flat = cross_entropy(logits.flatten(0, -2), grades.clamp(min=0).flatten(), reduction="none").view(grades.shape)
    return flat.where(grades >= 0, flat.new_zeros(()))


def margins(strength: Int[Tensor, "pairs"], table: str) -> PerPair:
    """Margin of each pair by its strength; 0 (no strength is known) has none.

    Raises:
        ValueError: a strength or a table that is none.
    """
    if table not in MARGINS:
        raise ValueError(f"margins are {' or '.join(MARGINS)}, not {table!r}")
    return _by_strength(strength, (0.0, *MARGINS[table]))


def preference_probabilities(strength: Int[Tensor, "pairs"]) -> PerPair:
    """AFM's target of each pair by its strength; 0 (no strength is known) counts as clearly better.

    Raises:
        ValueError: a strength that is none.
    """
    return _by_strength(strength, (PROBABILITIES[2], *PROBABILITIES))


def _by_strength(strength: Tensor, table: tuple[float, ...]) -> Tensor:
    if ((strength < 0) | (strength > len(STRENGTHS))).any():
        raise ValueError(f"strength is 1 to {len(STRENGTHS)}, or 0 where none is known, got {strength.tolist()}")
    return torch.tensor(table, device=strength.device)[strength.long()]
