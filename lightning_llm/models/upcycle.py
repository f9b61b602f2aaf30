"""Upcycling: the experts of a mixture, cut from the feed-forwards of a dense model that has learnt already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_llm.models.config import ModelConfig
from lightning_llm.models.feed_forward import FeedForward
from lightning_llm.models.transformer import Transformer


@torch.no_grad()
def upcycle(
    dense: Transformer,
    config: ModelConfig,
    *,
    experts: str,
    reinitialised: float,
    of: str,
    keeps_scale: bool,
    seed: int,
) -> Transformer:
    """A mixture of experts with all weights of a dense model but those of feed-forwards (Komatsuzaki et al. 2022, arXiv
    2212.05055), and experts that are made of these (Qwen 2, arXiv 2407.10671, section 2.2.2).

    "slices": the hidden units are shuffled, copy after copy, laid end to end and cut into the routed experts and the
    shared one; of each routed expert a random share is drawn anew, normal with the deviation of what it takes the place
    of. "copies": each is the whole feed-forward, and nothing is drawn anew.

    Routers are normal(0, initializer_range). The shared expert's gate is 0, half open. With `keeps_scale` (ours) the
    entries of `down` are multiplied so that the mixture adds about what the dense feed-forward did, see `scales`: with
    copies, and weights of the chosen experts that add up to 1, it adds exactly that.

    Args:
        config: the mixture's, of `derived.upcycled`.
        experts: slices | copies.
        reinitialised: share in [0, 1].
        of: entries (of the matrices, each by itself) | units (whole rows of gate and up, columns of down).
    """
    generator = torch.Generator().manual_seed(seed)
    state = {name: p.detach().clone() for name, p in dense.named_parameters() if ".mlp." not in name}
    blocks: Any = dense.layers
    for layer, block in enumerate(blocks):
        parts = mixture_of(block.mlp, config, experts, reinitialised, of, keeps_scale, generator)
        state |= {f"layers.{layer}.mlp.{name}": tensor for name, tensor in parts.items()}
    with torch.device("meta"):
        mixture = Transformer(config)
    mixture.load_state_dict(state, assign=True)
    return mixture


def mixture_of(
    dense: FeedForward,
    config: ModelConfig,
    experts: str,
    reinitialised: float,
    of: str,
    keeps_scale: bool,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Parameters of one layer's mixture, by name; arguments as of `upcycle`."""
    gate, up, down = dense.gate_proj.weight, dense.up_proj.weight, dense.down_proj.weight
    count, size, shared_size = config.num_experts, config.moe_intermediate_size, config.shared_expert_intermediate_size
    if experts == "copies":
        routed = torch.arange(size).expand(count, size)
        shared = torch.arange(shared_size)
    else:
        units = shuffled_copies(len(gate), count * size + shared_size, generator)
        routed, shared = units[: count * size].view(count, size), units[count * size :]
    parts = [gate[routed], up[routed], down.T[routed]]  # [E, h, d] each
    if experts == "slices" and reinitialised:
        parts = drawn_anew(parts, reinitialised, of, generator)
    of_routed, of_shared = scales(config, len(gate)) if keeps_scale else (1.0, 1.0)
    router = torch.randn(count, config.hidden_size, generator=generator) * config.initializer_range
    return {
        "gate.weight": router.to(gate),
        "experts.gate_up_proj.weight": torch.cat(parts[:2], dim=1),
        "experts.down_proj.weight": (parts[2] * of_routed).mT.contiguous(),
        "shared_expert.gate_proj.weight": gate[shared],
        "shared_expert.up_proj.weight": up[shared],
        "shared_expert.down_proj.weight": down[:, shared] * of_shared,
        "shared_expert_gate.weight": gate.new_zeros(1, config.hidden_size),
    }


def shuffled_copies(units: int, length: int, generator: torch.Generator) -> Tensor:
    """Indices [length] into hidden units: copies of all of them, each in an order of its own, laid end to end.

    No unit comes a second time before all have come once; what the last copy has left over is discarded.
    """
    copies = -(-length // units)
    return torch.cat([torch.randperm(units, generator=generator) for _ in range(copies)])[:length]


def drawn_anew(parts: list[Tensor], share: float, of: str, generator: torch.Generator) -> list[Tensor]:
    """Matrices [E, h, d] of experts, a random share of each replaced by normal values of its own deviation.

    Args:
        of: units: the same ones of all matrices of an expert; entries: any.
    """
    experts, units, width = parts[0].shape
    which = smallest(torch.rand(experts, units, 1, generator=generator), share)
    found = []
    for part in parts:
        if of == "entries":
            which = smallest(torch.rand(experts, units * width, generator=generator), share).view(part.shape)
        deviation = part.float().std(dim=(1, 2), keepdim=True)
        new = torch.randn(part.shape, generator=generator) * deviation.cpu()
        found.append(torch.where(which.to(part.device), new.to(part), part))
    return found


def smallest(values: Tensor, share: float) -> Tensor:
    """True for that share of each row's entries, exactly but for rounding, that is smallest."""
    flat = values.flatten(1)
    count = round(share * flat.shape[1])
    places = flat.argsort(dim=1)[:, :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, places, True).view(values.shape)


def scales(config: ModelConfig, units: int) -> tuple[float, float]:
    """Factors of the routed experts' `down` and of the shared one's.

    Each of the two adds half of what the dense feed-forward of n `units` did, in the mean: with an even router the k
    chosen experts weigh w in sum, 1 if normalised and k / E else, and each holds a share h / n of the units; the shared
    expert holds h_s / n of them behind a gate of 1 / 2.
    """
    weight = 1.0 if config.norm_topk_prob else config.num_experts_per_tok / config.num_experts
    routed = weight * config.moe_intermediate_size / units
    return 0.5 / routed, 0.5 / (0.5 * config.shared_expert_intermediate_size / units)
