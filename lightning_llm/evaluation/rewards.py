"""Is a reward model right, as sure as it may be, and does it like length: figures from scores of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef
from torchmetrics.functional.classification import binary_calibration_error

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import GRADED
from lightning_llm.data.rows import STRENGTHS
from lightning_llm.evaluation.preference import preference_accuracy
from lightning_llm.models.reward import RewardModel
from lightning_llm.objectives.reward_model import responses_in_order

BINS = 10  # of the probability of the order that the model prefers, from one half to 1
UNKNOWN = "unknown"  # strength of a preference


@dataclass(frozen=True)
class Rankings:
    """Scored responses of R prompts, on the CPU: chosen, rejected, edited; NaN and 0 tokens where nobody has edited."""

    scores: Float[Tensor, "R 3"]
    lengths: Int[Tensor, "R 3"]  # tokens
    strength: Int[Tensor, "R"]  # of chosen over rejected, 1 to 4; 0: unknown
    grades: Int[Tensor, "R 3 C"]  # of each response, in the order of GRADED; negative: not graded
    predicted_grades: dict[str, Int[Tensor, "R 3"]]  # thing that is graded -> the likeliest grade, if there is a head

    @property
    def edited(self) -> Tensor:
        """Which of the prompts have an edited response [R]."""
        return self.lengths[:, 2] > 0


def score_rankings(model: RewardModel, batches: Iterable[SegmentBatch]) -> Rankings:
    """All responses of the batches through the model.

    Args:
        batches: of rankings, with the columns `strength` and `grades` (`data/packing.py`).
    """
    scores, lengths, strength, grades = [], [], [], []
    predicted: dict[str, list[Tensor]] = {name: [] for name in model.grading}
    for batch in batches:
        prompts, *responses = responses_in_order(batch)
        places = torch.stack(responses, dim=1)  # [R, 3]
        is_there = places >= 0
        read = model.read(batch)  # [S, d]
        found = model.score(read).squeeze(-1).double()
        scores.append(found[places].masked_fill(~is_there, math.nan).cpu())
        tokens = batch.cu_seqlens.diff().long()
        lengths.append(tokens[places].where(is_there, tokens.new_zeros(())).cpu())
        strength.append(batch.columns["strength"][prompts].cpu())
        grades.append(batch.columns["grades"][places].masked_fill(~is_there[..., None], -1).cpu())
        for name, heads in predicted.items():
            heads.append(model.grading[name](read).argmax(-1)[places].cpu())
    return Rankings(
        torch.cat(scores),
        torch.cat(lengths),
        torch.cat(strength),
        torch.cat(grades),
        {name: torch.cat(found) for name, found in predicted.items()},
    )


def reward_metrics(found: Rankings) -> dict[str, float]:
    """The figures of a reward model; those that the rows do not decide are left out.

    preference/accuracy              share of prompts whose chosen response scores above the rejected one
    preference/accuracy_<strength>   the same of those whose preference is so strong
    preference/edited_first          share of prompts with an edited response where that scores above both others
    preference/calibration_error     `calibration_error`
    preference/length_correlation    `length_correlation` of the scores, and of people's order behind `_of_people`
    preference/margins               mean of chosen less rejected
    grading/<thing>                  share of grades that its network finds
    """
    chosen, rejected, edited = found.scores.unbind(1)
    pairs, margins = found.scores[:, :2], chosen - rejected
    metrics = {"preference/accuracy": preference_accuracy(pairs)}
    strengths = by_strength(found.strength)
    for name, rows in strengths.items() if len(strengths) > 1 else ():
        metrics[f"preference/accuracy_{name}"] = preference_accuracy(pairs[rows])
    if found.edited.any():
        first = (edited > chosen) & (edited > rejected)
        metrics["preference/edited_first"] = first[found.edited].double().mean().item()
    metrics["preference/calibration_error"] = calibration_error(margins)
    lengths = found.lengths.double().where(found.lengths > 0, math.nan)
    people = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64).expand_as(lengths)
    for name, order in (("", found.scores), ("_of_people", people)):
        correlation = length_correlation(order, lengths)
        if math.isfinite(correlation):
            metrics[f"preference/length_correlation{name}"] = correlation
    metrics["preference/margins"] = margins.mean().item()
    for name, predicted in found.predicted_grades.items():
        grades = found.grades[..., GRADED.index(name)]
        if (given := grades >= 0).any():
            metrics[f"grading/{name}"] = (predicted == grades)[given].double().mean().item()
    return metrics


def by_strength(strength: Int[Tensor, "R"]) -> dict[str, Tensor]:
    """Rows [R] of each strength that occurs, by its word, the weakest first."""
    words = {number: word for word, number in STRENGTHS.items()} | {0: UNKNOWN}
    return {words[number]: strength == number for number in sorted(set(strength.tolist()))}


def calibration_error(margins: Float[Tensor, "pairs"]) -> float:
    """Expected calibration error (Naeini et al. 2015): how far predicted probabilities are from frequencies.

    A margin m says that the chosen response is better with probability sigmoid(m) (Bradley and Terry). That it was
    chosen is the label, so each pair is asked both ways round: p for a thing that is true, 1 - p for one that is not.
    Over bins of equal width, weighted by their pairs, |mean probability - frequency|.
    """
    probabilities = margins.sigmoid()
    both = torch.cat([probabilities, 1 - probabilities])
    truth = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)]).long()
    return binary_calibration_error(both, truth, n_bins=2 * BINS, norm="l1").item()


def calibration_table(margins: Float[Tensor, "pairs"], strength: Int[Tensor, "pairs"]) -> list[dict[str, Any]]:
    """Predicted probability against frequency: one entry for all pairs, then one for each strength that occurs.

    Returns:
        Of each entry its `strength` (all, or a word), `pairs`, `accuracy`, `predicted` (mean probability that the
        chosen response is better), `calibration_error`, and `bins` of the probability p of the order that the model
        prefers: `begin`, `end`, `pairs`, `predicted` (mean p), `frequency` (of people preferring it too).
    """
    entries = {"all": torch.ones_like(strength, dtype=torch.bool), **by_strength(strength)}
    table = []
    for name, rows in entries.items():
        own = margins[rows]
        table.append(
            {
                "strength": name,
                "pairs": len(own),
                "accuracy": preference_accuracy(torch.stack([own, torch.zeros_like(own)], dim=1)),
                "predicted": own.sigmoid().mean().item(),
                "calibration_error": calibration_error(own),
                "bins": _bins(own),
            }
        )
    return table


def _bins(margins: Tensor) -> list[dict[str, float]]:
    probability = margins.abs().sigmoid()
    agrees = (margins > 0).double() + 0.5 * (margins == 0).double()
    place = ((probability - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    bins = []
    for number in sorted(set(place.tolist())):
        own = place == number
        bins.append(
            {
                "begin": 0.5 + number / (2 * BINS),
                "end": 0.5 + (number + 1) / (2 * BINS),
                "pairs": int(own.sum()),
                "predicted": probability[own].mean().item(),
                "frequency": agrees[own].mean().item(),
            }
        )
    return bins


def length_correlation(scores: Float[Tensor, "R K"], lengths: Float[Tensor, "R K"]) -> float:
    """Pearson's correlation of score and length among the responses to one prompt; NaN where either is constant.

    A reward is known up to a constant of its prompt, so from both its mean over the prompt's responses is taken first.

    Args:
        scores, lengths: NaN where a prompt has fewer responses.
    """
    is_there = ~(scores.isnan() | lengths.isnan())
    x, y = (values.where(is_there, math.nan) for values in (scores, lengths))
    x, y = ((values - values.nanmean(1, keepdim=True))[is_there] for values in (x, y))
    if len(x) < 2 or not x.abs().max() or not y.abs().max():
        return math.nan
    return pearson_corrcoef(x, y).item()
