"""Shapes of models made of another one: smaller by pruning, a mixture by upcycling. Without torch: a plan asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_llm.models.config import MIXTURE_FIELDS, SIZES, SLIDING, ModelConfig, shortest_cycle
from lightning_llm.models.family import check_family

MIXTURES = {"qwen2": "qwen2_moe"}  # dense family -> the class that has room for its layers with experts


def pruned(config: ModelConfig, sizes: Mapping[str, int | None], layers: Sequence[int] | None = None) -> ModelConfig:
    """The shape of a model that keeps so much of another.

    Query heads go with the key-value head that they share. A narrower stream has its mean square over fewer channels,
    so the norms' epsilon grows as it shrinks (models/prune.py).

    Args:
        sizes: of `SIZES`, each at most the parent's; None, or left out: as it is.
        layers: which stay, as many as `num_hidden_layers`; None, for a plan: their kinds follow one another as before.

    Raises:
        ValueError: names the field; it is larger than the parent's, or the parent is a mixture of experts.
        UserError: no class of transformers' has room for it.
    """
    if config.num_experts:
        raise ValueError(f"num_experts is {config.num_experts}, and only dense models are pruned")
    given = {name: size for name in SIZES if (size := sizes.get(name)) is not None}
    for name, size in given.items():
        if not 1 <= size <= getattr(config, name):
            raise ValueError(f"{name} lies in [1, {getattr(config, name)}], what the parent has, and is {size}")
    changes: dict[str, Any] = dict(given)
    if "num_key_value_heads" in given:
        each = config.num_attention_heads // config.num_key_value_heads
        changes["num_attention_heads"] = each * given["num_key_value_heads"]
    if given.keys() & {"num_key_value_heads", "hidden_size"}:
        changes["head_dim"] = config.head_size
    if "hidden_size" in given:
        changes["rms_norm_eps"] = config.rms_norm_eps * config.hidden_size / given["hidden_size"]
    if layers is not None:
        kinds = [config.layer_types[layer % len(config.layer_types)] for layer in layers]
        changes["layer_types"] = shortest_cycle(kinds)
        changes["sliding_window"] = config.sliding_window if SLIDING in kinds else None
    child = replace(config, **changes)
    check_family(child)
    return child


def upcycled(config: ModelConfig, experts: Mapping[str, Any]) -> ModelConfig:
    """The shape of a dense model whose feed-forwards have become mixtures of experts.

    Args:
        experts: of `MIXTURE_FIELDS`; a size that is None is the dense feed-forward's.

    Raises:
        ValueError: names the field; the family has no class for such a mixture, or is one, or the experts are none.
        UserError: no class of transformers' has room for it.
    """
    if config.family not in MIXTURES:
        known = ", ".join(MIXTURES)
        raise ValueError(f"family is {config.family}, and mixtures of experts are made of {known} alone")
    given = {name: config.intermediate_size if experts[name] is None else experts[name] for name in MIXTURE_FIELDS}
    mixture = replace(config, family=MIXTURES[config.family], **given)
    check_family(mixture)
    return mixture
