"""A model's weights laid out for the products of generation on a CPU: few rows at a time, and nothing is trained.

oneDNN multiplies with a large matrix that was reordered once at nearly the processor's full rate, also when there are
only a few rows; an ordinary product reorders it in every step. And it applies what follows, the activation and the
product of a gated linear unit, before results leave the registers. A call costs some 40 microseconds, so small matrices
are kept transposed instead: a product with few rows then reads both of its factors in their own order.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_llm.models.feed_forward import FUNCTIONS, FeedForward
from lightning_llm.models.soft_cap import soft_capped
from lightning_llm.models.transformer import Transformer

LARGEST = 2**31  # bytes of weights: packed ones stand in memory beside the model's own
SMALLEST = 2**20  # entries of a matrix that is packed; one of half as many gains nothing
ROWS = 32  # that the layout is made for; any number can be multiplied
NOTHING: tuple[str, list[float], str] = ("none", [], "")
ACTIVATIONS = {"silu": ("swish", [], ""), "gelu_pytorch_tanh": ("gelu", [], "tanh")}  # as oneDNN calls them


def can_be_packed(model: Transformer) -> bool:
    """Whether there is something to gain: float32 on a CPU for which torch was built with oneDNN, and no autocast."""
    weight = model.embed_tokens.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and sum(parameter.nbytes for parameter in model.parameters()) <= LARGEST
    )


class PackedLinear(nn.Module):
    """x W^T + b with W in oneDNN's order."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias  # of the model, by reference
        self.refresh()

    def refresh(self) -> None:
        """Pack the weights as they are now."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), ROWS)

    def forward(self, x: Tensor, activation: tuple[str, list[float], str] = NOTHING) -> Tensor:
        """[T, r] of x [T, c], and then the activation."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *activation)

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The product times a factor [T, r], entry by entry."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.packed, self.bias, "mul")


class TransposedLinear(nn.Module):
    """x W^T + b with W^T in its own memory: a third faster for 8 rows of a small matrix, a tenth to a fifth for 32."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias  # of the model, by reference
        self.transposed = torch.empty(weight.shape[::-1])
        self.refresh()

    def refresh(self) -> None:
        """Copy the weights as they are now."""
        self.transposed.copy_(self.weight.detach().T)

    def forward(self, x: Tensor) -> Tensor:
        """[T, r] of x [T, c]."""
        return x @ self.transposed if self.bias is None else torch.addmm(self.bias, x, self.transposed)


class PackedFeedForward(nn.Module):
    """down(act(gate x) * up x) in three products and nothing else."""

    def __init__(self, module: FeedForward):
        super().__init__()
        [name] = [name for name, function in FUNCTIONS.items() if function is module.act]
        self.activation = ACTIVATIONS[name]
        self.gate_proj, self.up_proj, self.down_proj = (
            PackedLinear(each.weight, None) for each in (module.gate_proj, module.up_proj, module.down_proj)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[T, d] of hidden states [T, d]."""
        return self.down_proj(self.up_proj.times(x, self.gate_proj(x, self.activation)))


class Packed:
    """A model for generation: its layers and `logits`, in other products where that is faster.

    Norms and embeddings are the model's own, so that `refresh` lays out matrices anew and that is all.
    """

    def __init__(self, model: Transformer):
        self.model, self.config = model, model.config
        self.is_packed = can_be_packed(model)
        self.body: Transformer = with_packed_weights(model) if self.is_packed else model  # what runs
        self.head: nn.Module | None = None
        if self.is_packed:
            self.head = laid_out(model.head_weight, None) if self.body.lm_head is None else self.body.lm_head

    def refresh(self) -> None:
        """Take over the weights as they are now."""
        for module in {*self.body.modules(), self.head}:
            if isinstance(module, PackedLinear | TransposedLinear):
                module.refresh()

    def logits(self, hidden: Tensor) -> Tensor:
        """`Transformer.logits`: [B, V] of hidden states [B, d]."""
        if self.head is None:
            return self.model.logits(hidden)
        return soft_capped(self.head(hidden), self.config.final_logit_softcapping)


def is_large(weight: Tensor) -> bool:
    """Whether a matrix is packed."""
    return weight.numel() >= SMALLEST


def laid_out(weight: Tensor, bias: Tensor | None) -> PackedLinear | TransposedLinear:
    """A product with a matrix in the order that suits its size."""
    return PackedLinear(weight, bias) if is_large(weight) else TransposedLinear(weight, bias)


def with_packed_weights(module: Any) -> Any:
    """A copy of a module, and of those in it, that shares all parameters and multiplies with packed ones."""
    if isinstance(module, FeedForward) and is_large(module.gate_proj.weight):
        return PackedFeedForward(module)
    if isinstance(module, nn.Linear):
        return laid_out(module.weight, module.bias)
    copied = copy.copy(module)
    copied._modules = {
        name: None if part is None else with_packed_weights(part) for name, part in module._modules.items()
    }
    return copied
