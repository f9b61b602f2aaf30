"""Optimizers: which parameters are in which group, with which decay."""

from __future__ import annotations

import torch
from torch import nn

from lightning_llm.optimization.config import AdamWConfig


def build_adamw(config: AdamWConfig, module: nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with decay on matrices only.

    Matrices are the projections and the embedding (two dimensions or more); norms and biases are left alone. The
    learning rate of a group is `lr_scale` times the schedule's, set before each step (`optimization/window.py`).
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [
        {"params": parameters, "weight_decay": decay, "lr_scale": 1.0}
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if parameters
    ]
    beta1, beta2 = config.betas
    # fused is not torch's default, and several times faster on a CPU
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=config.eps, fused=True)
