"""The logits of some tokens over the whole vocabulary: what a loss asks of them, and their gradient in their place."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable  # by what reads annotations in the tests
class Logits(Protocol):
    """Capped logits over the temperature [n, V] of a chunk of tokens. Each step uses up what the one before has left:
    `at`, `hide_`, `sum_`, `gradient_`."""

    def at(self, ids: Tensor) -> Tensor:
        """Those of ids [n, k], float32 or better."""
        ...

    def hide_(self, ids: Tensor) -> Tensor:
        """Leave ids [n, k] out of the sums and the softmax. An id may be listed twice: True [n, k] at one of each."""
        ...

    def sum_(self) -> tuple[Tensor, Tensor]:
        """The largest [n, 1], and the log of the sum of all exp(logit - largest) [n, 1]."""
        ...

    def gradient_(self, factors: Tensor, ids: Tensor, own: Tensor, added: Tensor) -> Tensor:
        """A gradient for the logits before their cap [n, V]; the temperature is the caller's.

        Args:
            factors: [n, 1], of the softmax.
            ids: [n, k], where something else stands:
            own: [n, k], in the place of the softmax, the same wherever an id is listed,
            added: [n, k], and what each time comes on top.
        """
        ...


class ComposedLogits:
    """Of torch's operations, each in place over a buffer in float32."""

    def __init__(self, logits: Tensor, slopes: Tensor | None = None):
        """
        Args:
            logits: [n, V], capped and over the temperature.
            slopes: [n, V] derivatives of the capped logits for the plain ones; None: there is no cap, or no gradient.
        """
        self.logits, self.slopes = logits, slopes

    def at(self, ids: Tensor) -> Tensor:
        """As `Logits`."""
        return self.logits.gather(1, ids)

    def hide_(self, ids: Tensor) -> Tensor:
        """As `Logits`."""
        numbers = torch.arange(ids.shape[1], dtype=self.logits.dtype, device=ids.device).expand(ids.shape)
        is_one = self.logits.scatter_(1, ids, numbers).gather(1, ids) == numbers  # whichever was written last
        self.logits.scatter_(1, ids, float("-inf"))
        return is_one

    def sum_(self) -> tuple[Tensor, Tensor]:
        """As `Logits`."""
        top, self.log_sum = exponentiate_(self.logits)
        return top, self.log_sum

    def gradient_(self, factors: Tensor, ids: Tensor, own: Tensor, added: Tensor) -> Tensor:
        """As `Logits`."""
        grad = self.logits.mul_(factors * (-self.log_sum).exp())
        return self.capped_(grad.scatter_(1, ids, own).scatter_add_(1, ids, added))

    def capped_(self, grad: Tensor) -> Tensor:
        """A gradient [n, V] for the capped logits, handed on to the plain ones."""
        return grad if self.slopes is None else grad.mul_(self.slopes)


@cache
def kernels_run() -> bool:
    """Whether the kernels of `fused_logits` compile and run on this GPU; says once why they do not."""
    from torch.utils._triton import has_triton

    if not has_triton():
        return False
    try:
        from lightning_llm.losses.fused_logits import FusedLogits

        FusedLogits(torch.zeros(1, 2, dtype=torch.bfloat16, device="cuda"), None, 1.0).sum_()
    except Exception as error:  # no C compiler, no headers, a card that is too old: whatever Triton says
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"the loss of the vocabulary is slower here: its kernels do not run ({reason})", stacklevel=2)
        return False
    return True


def exponentiate_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """In place to exp(logits - top) -> top, the largest logit [n, 1], and the log of the exponentials' sum [n, 1].

    One exponential per logit; `logsumexp` and a softmax would take two.
    """
    top = logits.amax(1, keepdim=True)
    return top, logits.sub_(top).exp_().sum(1, keepdim=True).log_()


def log_softmax_(logits: Tensor) -> Tensor:
    """In place; the largest is taken away first, so that differences of large logits stay exact."""
    logits.sub_(logits.amax(1, keepdim=True))
    return logits.sub_(logits.exp().sum(1, keepdim=True).log_())


def grouped(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ids [n, k] are equal: the number of each one's group in its row [n, k]; True at the first of each."""
    ordered, order = ids.sort(dim=1, stable=True)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = torch.empty_like(ids).scatter_(1, order, is_new.cumsum(1) - 1)
    return group, torch.empty_like(is_new).scatter_(1, order, is_new)


def sums_over_equals(ids: Tensor, values: Tensor) -> Tensor:
    """Of ids [n, k] that may be listed more than once, the sum of the values [n, k] of all that are equal, at each."""
    if ids.shape[1] == 1:
        return values
    group, _ = grouped(ids)
    return torch.zeros_like(values).scatter_add_(1, group, values).gather(1, group)
