"""Liger's fused linear cross-entropy: Triton kernels, which have no driver on a CPU."""

from __future__ import annotations

import vocabulary_inputs
from calls import Calls, serve


def vocabulary(calls: Calls) -> None:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    vocabulary_inputs.measure(calls, lambda hidden, weight, targets: loss(weight, hidden, targets))


if __name__ == "__main__":
    serve({"vocabulary": vocabulary}, ["liger-kernel", "triton"])
