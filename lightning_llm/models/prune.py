"""Structured pruning: which parts of a model stay, and the smaller model that they are.

The smaller model computes what the parent computes with the other parts masked: their outputs multiplied with 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_llm.models.config import ModelConfig
from lightning_llm.models.derived import pruned
from lightning_llm.models.transformer import Transformer

AXES: dict[str, tuple[str | None, ...]] = {  # end of a parameter's name -> what its rows, and its columns, stand for
    "embed_tokens.weight": (None, "channels"),
    "lm_head.weight": (None, "channels"),
    "qkv_proj.weight": ("qkv", "channels"),
    "qkv_proj.bias": ("qkv",),
    "o_proj.weight": ("channels", "heads"),
    "gate_proj.weight": ("units", "channels"),
    "up_proj.weight": ("units", "channels"),
    "down_proj.weight": ("channels", "units"),
    "q_norm.weight": (None,),
    "k_norm.weight": (None,),
    "norm.weight": ("channels",),  # the final one and those of the layers
}


@dataclass(frozen=True)
class Importance:
    """How much each part of a model matters; comparable within a row. None: this measure says nothing of them."""

    units: Tensor | None = None  # [L, n] hidden units of each feed-forward
    groups: Tensor | None = None  # [L, K] key-value heads of each layer, with the query heads that share them
    channels: Tensor | None = None  # [d] of the stream between the layers
    layers: Tensor | None = None  # [L]


@dataclass(frozen=True)
class Kept:
    """What stays, as indices in ascending order; None: everything."""

    units: Tensor | None = None  # [L, n'] of each layer
    groups: Tensor | None = None  # [L, K'] of each layer
    channels: Tensor | None = None  # [d']
    layers: Tensor | None = None  # [L']


def chosen(importance: Importance, sizes: Mapping[str, int | None]) -> Kept:
    """The most important parts, in each layer as many.

    Args:
        sizes: of `config.SIZES`; what they ask for must have an importance.
    """

    def largest(values: Tensor | None, count: int | None) -> Tensor | None:
        if count is None:
            return None
        assert values is not None, "checked: the measure ranks what is to be cut"
        return values.topk(count).indices.sort().values

    return Kept(
        units=largest(importance.units, sizes.get("intermediate_size")),
        groups=largest(importance.groups, sizes.get("num_key_value_heads")),
        channels=largest(importance.channels, sizes.get("hidden_size")),
        layers=largest(importance.layers, sizes.get("num_hidden_layers")),
    )


@torch.no_grad()
def cut(parent: Transformer, kept: Kept) -> Transformer:
    """The model that is left, which shares no memory with its parent.

    Its hidden states are those of the parent whose other hidden units, heads and layers add 0 to the stream. Of a
    narrower stream the parent's other channels are always 0: with d' of d channels left, the mean square is d / d'
    times as large and epsilon with it, so the weights of norms are multiplied with r = sqrt(d / d').

    Raises:
        ValueError: it is a mixture of experts, or more is to be kept than there is.
        UserError: no class of transformers' has room for the smaller model.
    """
    config = parent.config
    layers = list(range(config.num_hidden_layers)) if kept.layers is None else kept.layers.tolist()
    counts = {"intermediate_size": kept.units, "num_key_value_heads": kept.groups, "hidden_size": kept.channels}
    sizes = {name: None if indices is None else indices.shape[-1] for name, indices in counts.items()}
    smaller = pruned(config, sizes | {"num_hidden_layers": len(layers)}, layers)

    state: dict[str, Tensor] = {}
    for name, parameter in parent.named_parameters():
        if not name.startswith("layers."):
            state[name] = selected(name, parameter, {"channels": kept.channels})
    for new, old in enumerate(layers):
        entries = {"channels": kept.channels, "units": None if kept.units is None else kept.units[old]}
        if kept.groups is not None:
            entries |= attention_entries(config, kept.groups[old])
        for name, parameter in parent.layers[old].named_parameters():
            state[f"layers.{new}.{name}"] = selected(name, parameter, entries)
    if smaller.hidden_size != config.hidden_size:
        narrow(state, config, smaller)
    with torch.device("meta"):
        child = Transformer(smaller)
    child.load_state_dict(state, assign=True)
    return child


def axes_of(name: str) -> tuple[str | None, ...]:
    """What the axes of a parameter stand for."""
    return next(axes for ending, axes in AXES.items() if name.endswith(ending))


def selected(name: str, parameter: Tensor, entries: Mapping[str, Tensor | None]) -> Tensor:
    """A copy of a parameter with what stays along each of its axes.

    Args:
        entries: what an axis stands for -> indices along it; None, or left out: all.
    """
    part = parameter.detach()
    for axis, meaning in enumerate(axes_of(name)):
        indices = None if meaning is None else entries.get(meaning)
        if indices is not None:
            part = part.index_select(axis, indices.to(part.device))
    return part.clone()


def attention_entries(config: ModelConfig, groups: Tensor) -> dict[str, Tensor]:
    """What stays of attention's parameters with key-value heads `groups` [K'] and their query heads."""
    size, each = config.head_size, config.num_attention_heads // config.num_key_value_heads
    queries = (groups[:, None] * each + torch.arange(each)).flatten()  # [H']
    keys = config.num_attention_heads + groups  # [K'], counted over queries, keys and values
    values = keys + config.num_key_value_heads

    def rows(heads: Tensor) -> Tensor:
        return (heads[:, None] * size + torch.arange(size)).flatten()

    return {"heads": rows(queries), "qkv": rows(torch.cat((queries, keys, values)))}


def narrow(state: dict[str, Tensor], parent: ModelConfig, child: ModelConfig) -> None:
    """Make up, in place, for means over fewer channels.

    A norm of the parent's d channels of which d' are not 0 is x / sqrt(s / d + eps) with s the sum of squares; that of
    the child, with its larger epsilon, is smaller by r = sqrt(d / d').
    """
    ratio = (parent.hidden_size / child.hidden_size) ** 0.5
    offset = float(parent.norms_add_one)
    turned = (child.num_attention_heads + child.num_key_value_heads) * child.head_size  # rows of queries and keys
    for name, tensor in state.items():
        final = name == "norm.weight"
        if axes_of(name) == ("channels",):
            # embeddings below are made larger by r; where they are the head as well, the final norm must not be
            made_up = final and child.scale_embeddings and child.tie_word_embeddings
            tensor.copy_((tensor + offset) * (1.0 if made_up else ratio) - offset)
        elif name == "embed_tokens.weight" and child.scale_embeddings:
            tensor.mul_(ratio)  # since they are multiplied with sqrt(d')
        elif ".qkv_proj." in f".{name}" and child.qk_norm:
            tensor[:turned].mul_(ratio)  # their norms have the larger epsilon, too, and no fewer values
