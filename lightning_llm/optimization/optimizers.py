"""Optimizers: which parameters are in which group, with which decay and which share of the learning rate.

The learning rate of a group is `lr_scale` times the schedule's, set before each step (optimization/window.py). All
state is in the optimizer's `state`, as tensors; each class says under which names.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from lightning_llm.optimization.config import (
    AdamWConfig,
    AFMRMSPropConfig,
    EntrywiseConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
)
from lightning_llm.optimization.lion import Lion
from lightning_llm.optimization.mu_param import mu_scale
from lightning_llm.optimization.muon import Muon
from lightning_llm.optimization.rmsprop import AFMRMSProp

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_adamw(config: AdamWConfig, module: nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

    State of a parameter: `step` ([]), `exp_avg` and `exp_avg_sq` (of its shape).
    """
    beta1, beta2 = config.betas
    # fused is not torch's default, and several times faster on a CPU
    return torch.optim.AdamW(
        _entrywise_groups(config, module), lr=0.0, betas=(beta1, beta2), eps=config.eps, fused=True
    )


def build_lion(config: LionConfig, module: nn.Module) -> Lion:
    """Lion (Chen et al. 2023, arXiv 2302.06675) over all that is trained in `module`; norms and biases do not decay.

    State of a parameter: `exp_avg` (of its shape).
    """
    return Lion(_entrywise_groups(config, module), betas=config.betas)


def build_afm_rmsprop(config: AFMRMSPropConfig, module: nn.Module) -> AFMRMSProp:
    """AFM's RMSProp with momentum (arXiv 2407.21075, section 3.2.4), whose decay does not follow the peak rate.

    State of a parameter: `step` ([]), `exp_avg_sq` and `exp_avg` (of its shape).
    """
    groups = _entrywise_groups(config, module)
    return AFMRMSProp(groups, betas=config.betas, eps=config.eps, update_clip=config.update_clip)


def build_muon(config: MuonConfig, module: nn.Module) -> Muon:
    """Muon for the matrices of the layers; embedding, head, norms, biases and what else there is get AdamW."""
    groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in _trained(module):
        decay = _decay(config, parameter)
        if parameter.ndim >= 2 and "layers" in name.split("."):
            groups[decay, 1.0, _parts(module, name)].append(parameter)
        else:
            groups[decay, config.adamw_lr_scale, None].append(parameter)
    return Muon(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale, "parts": parts}
            for (decay, scale, parts), parameters in groups.items()
        ],
        momentum=config.momentum,
        nesterov=config.nesterov,
        steps=config.newton_schulz_steps,
        dtype=DTYPES[config.newton_schulz_precision],
        scale=config.update_scale,
        betas=config.betas,
        eps=config.eps,
    )


def _entrywise_groups(config: EntrywiseConfig, module: nn.Module) -> list[dict[str, Any]]:
    """One group for each pair of decay and share of the learning rate.

    muParam changes how far a gradient moves a weight and not what decay takes away (section 3.2.2 of its paper), so
    where a decay is multiplied by the learning rate it is divided by the group's share.
    """
    base_width = config.mu_param.base_width
    width: int = module.config.hidden_size if base_width else 0  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in _trained(module):
        scale = mu_scale(name, parameter.shape, width=width, base_width=base_width)
        decay = _decay(config, parameter)
        groups[decay / scale if config.decay_follows_rate else decay, scale].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def _decay(config: OptimizerConfig, parameter: nn.Parameter) -> float:
    """Of matrices, the projections and the embedding; norms and biases are left alone."""
    return config.weight_decay if parameter.ndim >= 2 else 0.0


def _parts(module: nn.Module, name: str) -> tuple[int, ...]:
    """Rows of the matrices that a parameter holds on top of each other; (): it is one."""
    return getattr(module.get_submodule(name.rpartition(".")[0]), "parts", ())
