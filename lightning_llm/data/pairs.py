"""The best response to a prompt against the worst: what preferences are learnt from, sampled before or meanwhile."""

from __future__ import annotations

from collections.abc import Sequence


def best_against_worst(
    scores: Sequence[float], winners: Sequence[int], losers: Sequence[int]
) -> tuple[int, int] | None:
    """Places of the response that scores highest and of the one that scores lowest (Qwen 2, arXiv 2407.10671, section
    4.3); None where the first is not above the second.

    Args:
        scores: by place.
        winners: places of those that may be chosen: what was cut off is no example to follow, whatever a judge says of
            it. Of equals the first is taken, so who wants a draw among them shuffles.
        losers: places of those that may be rejected, alike.
    """
    if not winners or not losers:
        return None
    best = max(winners, key=lambda place: scores[place])
    worst = min(losers, key=lambda place: scores[place])
    return (best, worst) if scores[best] > scores[worst] else None
