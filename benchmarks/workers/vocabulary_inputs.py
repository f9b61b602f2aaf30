"""Hidden states, a head's weight and targets, the same in every environment, and the call that is timed on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from calls import Calls
from torch import Tensor

Loss = Callable[[Tensor, torch.nn.Parameter, Tensor], Tensor]  # hidden [T, d], weight [V, d], targets [T] -> mean, []


def measure(calls: Calls, loss: Loss) -> None:
    """One call is the mean loss over all tokens and its gradients for hidden states and weight."""
    tokens, width, vocabulary = (calls.settings[name] for name in ("tokens", "width", "vocabulary"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, width, generator=generator) * 0.02)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    calls.before_building()  # the inputs are everybody's, their gradients and all between are the method's
    for _ in calls:
        hidden.grad = weight.grad = None
        result = loss(hidden, weight, targets)
        result.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        calls.done(loss=result.item(), gradients=[hidden.grad.norm().item(), weight.grad.norm().item()])
