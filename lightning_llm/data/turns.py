"""Whose turn it is among prompts: an order of the seed, gone through round by round."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def draw_places(
    rows: Mapping[str, int], weights: Mapping[str, float], count: int, turn: int, seed: int
) -> list[tuple[str, int]]:
    """(source, row) of the prompts of a round: sources by their weights, rows of each in an order of the seed.

    Each round goes on where the one before has ended, and begins again behind the last row.

    Args:
        rows: of each source.
        weights: shares of the sources; of one that has fewer rows all are taken.
        count: prompts of a round.
        turn: number of the round, from 0.
    """
    total = sum(weights.values())
    ends = np.rint(np.cumsum([weights[name] / total * count for name in rows])).astype(int).tolist()
    wanted = dict(zip(rows, np.diff([0, *ends]).tolist(), strict=True))
    drawn = []
    for name, there in rows.items():
        order = np.random.default_rng([seed, *name.encode()]).permutation(there)
        taken = min(wanted[name], there)
        for place in range(taken):
            drawn.append(((place + 0.5) / taken, name, int(order[(turn * wanted[name] + place) % there])))
    drawn.sort(key=lambda entry: entry[0])  # stable: sources take turns in the shares of their weights
    return [(name, row) for _, name, row in drawn]
