"""The feed-forward half of a layer as a mixture of experts: a router sends every token to a few of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear

from lightning_llm.models.config import ModelConfig
from lightning_llm.models.feed_forward import FUNCTIONS, FeedForward

ALIGNMENT = 16  # bytes; torch's grouped product wants rows that begin at multiples of it


@dataclass(frozen=True)
class Routed:
    """What one router did with the tokens of a pass."""

    probability: Tensor  # [E] float32, summed over the tokens; differentiable
    load: Tensor  # [E] float32, how many tokens each expert got: num_experts_per_tok from each token
    tokens: int


class ToExperts(torch.autograd.Function):
    """Rows [T, d] -> [T * k, d], each copied k times and sorted by expert. Its transpose is `FromExperts`.

    Both ways only read where they are told, so sums over a token's k copies have one order on every device.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        """[T * k, d] of x [T, d].

        Args:
            order: [T * k], for each sorted row which of the copies, token by token, it is.
            places: [T, k], where each token's copies are among the sorted rows.
        """
        ctx.save_for_backward(order, places)
        return x.index_select(0, order // places.shape[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """[T, d] of a gradient [T * k, d]."""
        _, places = ctx.saved_tensors
        return gathered(gradient, places), None, None


class FromExperts(torch.autograd.Function):
    """Rows [T * k, d], sorted by expert -> [T, d], the sums over each token's k."""

    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, places: Tensor) -> Tensor:
        """[T, d] of y [T * k, d]; `order` and `places` as in `ToExperts`."""
        ctx.save_for_backward(order, places)
        return gathered(y, places)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """[T * k, d] of a gradient [T, d]."""
        order, places = ctx.saved_tensors
        return gradient.index_select(0, order // places.shape[1]), None, None


def gathered(rows: Tensor, places: Tensor) -> Tensor:
    """Sums over each token's rows: [T, d] of rows [T * k, d] that lie at places [T, k]."""
    return rows.index_select(0, places.flatten()).unflatten(0, places.shape).sum(1)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x W_e^T for the rows of each expert, without a bound on their number and without padding: dropless.

    Torch's grouped product where it runs: one kernel in bf16 on a GPU from Hopper on; elsewhere a loop without Python's
    overhead, on a CPU as fast as anything tried. It wants aligned rows; odd sizes are multiplied expert by expert.

    Args:
        x: [n, c], sorted by expert.
        weight: [E, r, c].
        ends: [E] int32, where each expert's rows end; one without rows has a gradient of 0.

    Returns:
        [n, r]
    """
    if all(size * x.element_size() % ALIGNMENT == 0 for size in weight.shape[1:]):
        return grouped_mm(x, weight.transpose(1, 2), offs=ends)
    rows = x.tensor_split(ends[:-1].cpu().long())  # pyright: ignore[reportArgumentType]  # a tensor of indices is fine
    return torch.cat([linear(part, matrix) for part, matrix in zip(rows, weight.unbind(), strict=True)])


class GroupedLinear(nn.Module):
    """A matrix for every expert, held as one parameter [E, r, c]."""

    def __init__(self, experts: int, in_features: int, out_features: int, parts: tuple[int, ...] = ()):
        """
        Args:
            parts: rows of the matrices that each expert's holds on top of each other; (): it is one.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        self.parts = parts

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """[n, r] of rows x [n, c] that are sorted by expert and end at `ends` [E]; in autocast's type, if it is on."""
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return grouped_product(x.to(dtype), self.weight.to(dtype), ends)


class Experts(nn.Module):
    """E feed-forwards down_e(act(gate_e x) * up_e x), of which a token meets k."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        count, width, size = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.act = FUNCTIONS[config.hidden_act]
        self.gate_up_proj = GroupedLinear(count, width, 2 * size, parts=(size, size))
        self.down_proj = GroupedLinear(count, size, width)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums over the chosen experts, and how many tokens each expert got.

        Args:
            x: [T, d]
            chosen: [T, k] int64, each token's experts.
            weights: [T, k], what their outputs are multiplied with.

        Returns:
            [T, d]; [E] int64
        """
        count = self.down_proj.weight.shape[0]
        expert, order = chosen.flatten().sort(stable=True)  # [T * k], by expert, then by token
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.searchsorted(expert, torch.arange(count, device=expert.device), right=True)  # [E]
        rows = ToExperts.apply(x, order, places.view_as(chosen))  # [T * k, d]
        gate, up = self.gate_up_proj(rows, ends.int()).chunk(2, dim=-1)
        # the weights act here, where rows are short; down_proj is linear
        inner = self.act(gate) * up * weights.flatten().index_select(0, order).unsqueeze(1).to(gate.dtype)
        outputs = self.down_proj(inner, ends.int())
        return FromExperts.apply(outputs, order, places.view_as(chosen)), ends.diff(prepend=ends.new_zeros(1))


class MixtureOfExperts(nn.Module):
    """Qwen 2's (arXiv 2407.10671, section 2.2.2, eq. 1 and 2; the shared expert's gate: the released model).

    With p = softmax(G x) over the experts:
        sum over the k largest p_i of p_i expert_i(x)  +  sigmoid(g x) shared(x)

    where the p_i are divided by their sum first if `norm_topk_prob`. The router works in float32 whatever the rest does
    (Fedus et al. 2022, arXiv 2101.03961, section 2.4). `routed` is what it did in the last pass.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.chosen, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = FeedForward(config, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.routed: Routed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[T, d] of hidden states [T, d]; `routed` is then about these tokens."""
        with torch.autocast(x.device.type, enabled=False):
            probabilities = linear(x.float(), self.gate.weight.float()).softmax(-1)  # [T, E]
        weights, chosen = probabilities.topk(self.chosen)  # [T, k]
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        routed, load = self.experts(x, chosen, weights)
        self.routed = Routed(probabilities.sum(0), load.float(), len(x))
        return routed + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "routed": None}  # a copy has routed nothing; and what it holds cannot be copied
