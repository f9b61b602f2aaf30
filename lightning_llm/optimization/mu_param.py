"""Simple muParam: one learning rate for models of every width."""

from __future__ import annotations

from collections.abc import Sequence


def mu_scale(name: str, shape: Sequence[int], *, width: int, base_width: int | None) -> float:
    """What the learning rate of a parameter is multiplied with (Wortsman et al. 2023, arXiv 2309.14322, section 3.2.4).

    An optimizer that moves each entry of a matrix by about the learning rate moves the matrix's outputs by the rate
    times the number of its inputs, since all of them pull the same way. Simple muParam takes that back, on matrices
    alone, and leaves weights and outputs as they are:

        min(1, base_width / width)   weights of linear layers, the head's among them
        1                            embeddings (a tied head is one), norms, biases

    The minimum is AFM's, whose rate was tuned at a width of 768: narrower models keep it.

    Args:
        name, shape: of the parameter.
        width: of the model, entries of a hidden state.
        base_width: the width at which the learning rate was tuned; none: 1 for every parameter.
    """
    if base_width is None or len(shape) < 2 or "embed_tokens" in name.split("."):
        return 1.0
    return min(1.0, base_width / width)
