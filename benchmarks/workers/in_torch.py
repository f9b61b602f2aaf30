"""torch alone: logits of all tokens at once, and torch's own linear cross-entropy."""

from __future__ import annotations

import torch
import vocabulary_inputs
from calls import Calls, serve
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy


def dense(calls: Calls) -> None:
    vocabulary_inputs.measure(calls, lambda hidden, weight, targets: cross_entropy(linear(hidden, weight), targets))


def fused(calls: Calls) -> None:
    """With options it works in chunks; without, it is the dense one."""
    options = torch.nn.LinearCrossEntropyOptions()
    vocabulary_inputs.measure(
        calls, lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, options=options)
    )


if __name__ == "__main__":
    serve({job.__name__: job for job in (dense, fused)}, [])
