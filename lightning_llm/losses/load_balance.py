"""The load-balancing loss of a mixture of experts: cheapest where every expert gets equally many tokens."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def load_balancing_loss(
    probability: Float[Tensor, "layers experts"], load: Float[Tensor, "layers experts"], tokens: int
) -> Float[Tensor, ""]:
    """Fedus et al. 2022 (arXiv 2101.03961, eq. 4), for several experts per token and over all layers together.

    With f_i the mean number of times that a token of a layer is sent to expert i, and P_i the mean probability that
    the router gives it, both over tokens and layers:
        loss = E sum_i f_i P_i

    k where all is even, with k experts per token. The gradient comes through P alone: f is a count. Means over the
    layers stand inside the product, as in transformers' classes, whose `router_aux_loss_coef` is a weight of this loss:
    one layer may lean to an expert that another avoids. It is a mean over tokens that is not additive over them: the
    loss of two batches together is not the mean of their losses.

    Args:
        probability: the router's, summed over tokens.
        load: how many tokens each expert got.
        tokens: in each layer.
    """
    layers, experts = probability.shape
    pooled = max(layers * tokens, 1)
    return experts * (load.sum(0) / pooled * (probability.sum(0) / pooled)).sum()


def load_imbalance(load: Float[Tensor, "layers experts"]) -> Float[Tensor, ""]:
    """Tokens of a layer's busiest expert over those of its mean one, averaged over layers: 1 even, E / k at worst."""
    return (load.amax(1) / load.mean(1)).mean()
