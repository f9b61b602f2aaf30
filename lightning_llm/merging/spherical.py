"""Spherical interpolation: along an arc, so that directions at right angles do not shorten each other.

What models have learnt apart from each other, their task vectors, lie nearly at right angles: the mean of two has .71
of their length. Whole weights are nearly parallel, and there an arc is a straight line (WARP, arXiv 2406.16768).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_llm.merging.averaging import share, weighted_sum
from lightning_llm.merging.states import LazyState, Merge, Rule, State, blocks, differences, layer_of, refuse_unlike

STRAIGHT = 1e-6  # below this sine of the angle an arc is a line, or the way round is not known
PIECE = 4096  # entries whose products are summed up before they are widened


@Merge
def slerp(a: State, b: State, t: float) -> LazyState:
    """Along the arc from a (t = 0) to b (t = 1), an angle for each layer; of weights themselves.

    Raises:
        ValueError: the states are of different models, or t is out of range.
    """
    refuse_unlike([a, b])
    weights = layer_weights(a, lambda name: blocks([a, b], name), share(t, "t"))

    def rule_of(name: str) -> Rule:
        return lambda ends: weighted_sum(ends, weights(name))

    return LazyState(a, [a, b], rule_of)


@Merge
def slerp_task_vectors(init: State, states: Sequence[State], t: float | None = None) -> LazyState:
    """init + the arc between task vectors d_m = theta_m - init (WARP, arXiv 2406.16768, eq. SLERP and eq. 26).

    Of two, with W the angle between them:
        init + sin((1 - t) W) / sin W * d_1 + sin(t W) / sin W * d_2
    Of more, one after the other: what the first m - 1 have become with the m-th at t = 1 / m. The angle is that of a
    layer, over all of its parameters; embedding, final norm and head have one each.

    Args:
        init: where all states began.
        t: of two states how near the second is, in [0, 1]; none: 1 / M.

    Raises:
        ValueError: the states are of different models, or t is no place on the arc.
    """
    refuse_unlike([init, *states])
    if t is not None and len(states) != 2 and not math.isclose(t, 1 / len(states)):
        raise ValueError(f"t is for two models; {len(states)} have t = 1 / {len(states)}, got {t:g}")
    place = share(0.5 if t is None else t, "t")
    everyone = [init, *states]
    weights = layer_weights(init, lambda name: (differences(*entries) for entries in blocks(everyone, name)), place)

    def rule_of(name: str) -> Rule:
        return lambda entries: weighted_sum([entries[0], *differences(*entries)], [1.0, *weights(name)])

    return LazyState(states[0], everyone, rule_of)


def layer_weights(
    names: State, vectors: Callable[[str], Iterable[Sequence[Tensor]]], t: float
) -> Callable[[str], Sequence[float]]:
    """A function from a parameter's name to the weights of its layer's vectors.

    A layer is read when the first of its parameters is asked for, block by block: all that is kept of it are the inner
    products of its vectors.
    """
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        layers[layer_of(name)].append(name)

    @functools.cache
    def of_layer(layer: str) -> list[float]:
        return arc_weights(sum(inner_products(vectors(name)) for name in layers[layer]), t)  # pyright: ignore[reportArgumentType]

    return lambda name: of_layer(layer_of(name))


def inner_products(vectors: Iterable[Sequence[Tensor]]) -> np.ndarray:
    """Of each of M vectors with each, [M, M] in float64; they come in blocks of the same entries.

    Products of a few thousand entries are summed up in the vectors' own type, these sums in float64: what is
    rounded is no more than a few thousand products, and little is widened.
    """
    products = None
    for entries in vectors:
        flat = torch.stack(list(entries))  # [M, n]
        whole = flat.shape[1] // PIECE * PIECE
        pieces = flat[:, :whole].unflatten(1, (-1, PIECE)).transpose(0, 1)  # [n / PIECE, M, PIECE]
        rest = flat[:, whole:].double()
        of_block = torch.bmm(pieces, pieces.transpose(1, 2)).double().sum(0) + rest @ rest.T
        products = of_block if products is None else products + of_block
    assert products is not None  # also an empty tensor has a block
    return products.cpu().numpy()


def arc_weights(products: np.ndarray, t: float) -> list[float]:
    """Weights w of vectors such that sum w_m d_m is what they become one after the other.

    An arc is a sum of its ends, so the next angle follows from inner products alone: <v, d_m> = sum_i w_i <d_i, d_m>.

    Args:
        products: inner products of the vectors, [M, M].
        t: place on the arc of two vectors; of more it is 1 / m at the m-th.
    """
    count = len(products)
    weights = np.zeros(count)
    weights[0] = 1.0
    for m in range(1, count):
        place = t if count == 2 else 1 / (m + 1)
        length = math.sqrt(max(weights @ products @ weights, 0.0)) * math.sqrt(products[m, m])
        before, new = arc(float(weights @ products[m]) / length if length else 1.0, place)
        weights *= before
        weights[m] = new
    return weights.tolist()


def arc(cosine: float, t: float) -> tuple[float, float]:
    """Weights of the two ends at a place t on the arc between them; of a line, where there is no arc."""
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    if math.sin(angle) < STRAIGHT:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
