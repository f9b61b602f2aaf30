"""What matters in a model: by the sizes of its weights, by what flows through it, or as masks have learnt it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.hooks import RemovableHandle

from lightning_llm.batch import SegmentBatch
from lightning_llm.models.config import PruneConfig
from lightning_llm.models.prune import Importance, axes_of
from lightning_llm.models.transformer import RMSNorm, Transformer

# ---- as conf/prune/ names them: (setting, model, batches, scores) -> importance ----


def measure_magnitude(
    config: PruneConfig, model: Transformer, batches: Iterable[SegmentBatch], scores: Tensor | None
) -> Importance:
    """`by_magnitude`."""
    return by_magnitude(model)


def measure_activation(
    config: PruneConfig, model: Transformer, batches: Iterable[SegmentBatch], scores: Tensor | None
) -> Importance:
    """`by_activation`."""
    return by_activation(model, batches)


def measure_masks(
    config: PruneConfig, model: Transformer, batches: Iterable[SegmentBatch], scores: Tensor | None
) -> Importance:
    """Hidden units by their scores [L, n]: with those of the largest the masks are 1."""
    assert scores is not None, "checked by the stage"
    return Importance(units=scores)


# ---- the measures ----


@torch.no_grad()
def by_magnitude(model: Transformer) -> Importance:
    """By norms of weights.

    A unit: |its row of gate| |its row of up| |its column of down|: a product, since a row of `up` twice as large with a
    column of `down` half as large is the same model. A key-value head: |its rows of values| |its columns of o|. A
    channel: the norm of all weights that read or write it. A layer has none.
    """
    config = model.config
    squares = torch.zeros(config.hidden_size, device=model.embed_tokens.weight.device)
    for name, parameter in model.named_parameters():
        if "channels" in axes_of(name) and parameter.ndim == 2:
            squares += parameter.float().square().sum(1 - axes_of(name).index("channels"))
    units, groups = [], []
    layers: Any = model.layers
    for layer in layers:
        gate, up, down = (getattr(layer.mlp, f"{part}_proj").weight.float() for part in ("gate", "up", "down"))
        units.append(gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0))
        values = layer.self_attn.qkv_proj.weight.float()[-config.num_key_value_heads * config.head_size :]
        outputs = layer.self_attn.o_proj.weight.float().unflatten(1, (config.num_key_value_heads, -1))  # [d, K, ..]
        groups.append(values.unflatten(0, (config.num_key_value_heads, -1)).norm(dim=(1, 2)) * outputs.norm(dim=(0, 2)))
    return Importance(torch.stack(units), torch.stack(groups), squares.sqrt())


@torch.no_grad()
def by_activation(model: Transformer, batches: Iterable[SegmentBatch]) -> Importance:
    """By means over the tokens of some batches (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2).

    A unit: |h_j|, h what goes into `down`. A key-value head: the norm of what its query heads hand to `o`. A channel:
    |norm(x)_j|, over all norms of the stream. A layer: 1 - cos(x, y), x what goes into it and y what comes out (Men et
    al. 2024, arXiv 2403.03853, eq. 1): one that changes nothing is not missed.

    Raises:
        ValueError: there is no token.
    """
    sums: dict[str, dict[int, Tensor]] = defaultdict(dict)
    tokens = 0
    with heard(model, sums):
        for batch in batches:
            model(batch)
            tokens += batch.num_tokens
    if not tokens:
        raise ValueError("no token has gone through the model")
    means = {name: torch.stack([each for _, each in sorted(parts.items())]) / tokens for name, parts in sums.items()}
    return Importance(means["units"], means["groups"], means["channels"].mean(0), means["layers"])


@contextmanager
def heard(model: Transformer, sums: dict[str, dict[int, Tensor]]) -> Iterator[None]:
    """Inside, every pass of the model adds to sums over tokens: name -> layer (or norm) -> [..], in float64."""
    groups = model.config.num_key_value_heads

    def add(name: str, place: int, value: Tensor) -> None:
        """value [T, ..]"""
        total = value.double().sum(0)
        sums[name][place] = total if place not in sums[name] else sums[name][place] + total

    def inputs_are(name: str, place: int, size: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        return lambda module, inputs: add(name, place, size(inputs[0]))

    def changes(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            add("layers", place, 1 - cosine_similarity(inputs[0].double(), output.double(), dim=-1))

        return hook

    def outputs_are(place: int) -> Callable[..., None]:
        return lambda module, inputs, output: add("channels", place, output.abs())

    def norms(outputs: Tensor) -> Tensor:
        return outputs.float().unflatten(-1, (groups, -1)).norm(dim=-1)  # [T, K] of [T, H * D]

    handles: list[RemovableHandle] = []
    layers: Any = model.layers
    for place, layer in enumerate(layers):
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(inputs_are("units", place, torch.abs)))
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(inputs_are("groups", place, norms)))
        handles.append(layer.register_forward_hook(changes(place)))
    modules = [module for name, module in model.named_modules() if "self_attn" not in name]  # norms of heads are others
    for place, norm in enumerate(module for module in modules if isinstance(module, RMSNorm)):
        handles.append(norm.register_forward_hook(outputs_are(place)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
