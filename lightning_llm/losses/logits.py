"""The logits of some tokens over the whole vocabulary: what a loss asks of them, and their gradient in their place."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Logits(Protocol):
    """Capped logits over the temperature [n, V] of a chunk of tokens. Each step uses up what the one before has left:
    `at`, `hide_`, `sum_`, `gradient_`."""

    def at(self, ids: Tensor) -> Tensor:
        """Those of ids [n, k], float32 or better."""
        ...

    def hide_(self, ids: Tensor) -> None:
        """Leave ids [n, k] out of the sums, and out of the softmax."""
        ...

    def sum_(self) -> tuple[Tensor, Tensor]:
        """The largest [n, 1], and the log of the sum of all exp(logit - largest) [n, 1]."""
        ...

    def gradient_(self, factors: Tensor, ids: Tensor, of_ids: Tensor) -> Tensor:
        """Slopes of the softmax, factors [n, 1] times it and `of_ids` [n, k] at the ids, handed on to the plain logits
        through the cap: [n, V]. The temperature is the caller's."""
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

    def hide_(self, ids: Tensor) -> None:
        """As `Logits`."""
        self.logits.scatter_(1, ids, float("-inf"))

    def sum_(self) -> tuple[Tensor, Tensor]:
        """As `Logits`."""
        top, self.log_sum = exponentiate_(self.logits)
        return top, self.log_sum

    def gradient_(self, factors: Tensor, ids: Tensor, of_ids: Tensor) -> Tensor:
        """As `Logits`."""
        return self.capped_(self.logits.mul_(factors * (-self.log_sum).exp()).scatter_(1, ids, of_ids))

    def capped_(self, grad: Tensor) -> Tensor:
        """A gradient [n, V] for the capped logits, handed on to the plain ones."""
        return grad if self.slopes is None else grad.mul_(self.slopes)


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


def sums_over_equals(ids: Tensor, values: Tensor) -> Tensor:
    """Of ids [n, k] that may be listed more than once, the sum of the values [n, k] of all that are equal, at each."""
    if ids.shape[1] == 1:
        return values
    equal = (ids[:, :, None] == ids[:, None, :]).to(values.dtype)  # [n, k, k]
    return (equal @ values[:, :, None]).squeeze(2)


def is_first_of_equals(ids: Tensor) -> Tensor:
    """Of ids [n, k] that may be listed more than once, the first of each: True [n, k]."""
    equal = ids[:, :, None] == ids[:, None, :]  # [n, k, k]
    return ~equal.tril(-1).any(2)
