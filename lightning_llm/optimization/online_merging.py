"""Online merging around any optimizer: what it proposes is merged with what a reference model has learnt.

Lu et al. 2024 (arXiv 2405.17931), algorithms 1 and 2; Qwen 2 trains its online DPO so (section 4.3 of its report).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_llm.merging.online import ondare, onties, seeded
from lightning_llm.optimization.config import OnlineMergingConfig, OptimizerConfig


class OnlineMerging:
    """Hooks before and after an optimizer's step.

    With d_t the optimizer's own step, its decay c_t theta taken apart, tau the reference's task vector and K the gap:
        t mod K > 0:  theta <- (1 - c_t) theta + d_t;             d <- d + d_t
        t mod K = 0:  theta <- (1 - c_t) theta - d + merge(d + d_t, tau);   d <- 0
    so at every K-th step the plain ones since the last merge are taken back and merged once, in sum. Steps after the
    last multiple of K stay plain.

    The optimizer works on zeros: what it leaves there is its step, unrounded and without decay. That needs one whose
    step does not depend on the weights but for its decay, as all of ours are.

    State of a parameter, beside the optimizer's own: `merging_steps` (t, []) and, with a gap, `merging_delta` (d, of
    its shape). What is dropped depends on seed, t and the parameter's name, so all ranks drop the same.
    """

    def __init__(self, config: OptimizerConfig, taus: Mapping[str, Tensor], seed: int):
        self.config: OnlineMergingConfig = config.online_merging
        self.decay_follows_rate = config.decay_follows_rate
        self.seed = seed
        self._taus = dict(taus)  # by name; on the parameters' device from the first step on
        self._names: dict[nn.Parameter, str] = {}
        self._weights: dict[nn.Parameter, Tensor] = {}  # while the optimizer works

    def around(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> torch.optim.Optimizer:
        """The same optimizer, whose steps are merged from now on.

        Raises:
            ValueError: the task vector is not of this module; names the parameter.
        """
        for name, parameter in module.named_parameters():
            self._names[parameter] = name
            found = self._taus.get(name)
            if found is None or found.shape != parameter.shape:
                shape = "none" if found is None else f"one of shape {list(found.shape)}"
                raise ValueError(f"{name} has shape {list(parameter.shape)}, and base and reference have {shape}")
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        return optimizer

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._weights[parameter] = parameter.detach().clone()
                    parameter.zero_()

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            rate = group["lr"] if self.decay_follows_rate else group["schedule"]
            kept = 1 - rate * group["weight_decay"]
            for parameter in group["params"]:
                if parameter in self._weights:
                    weights = self._weights.pop(parameter).mul_(kept)
                    self._merge(self._names[parameter], parameter, weights, optimizer.state[parameter])

    def _merge(self, name: str, parameter: Tensor, weights: Tensor, state: dict[str, Any]) -> None:
        """Turn a parameter that holds the optimizer's step into the next weights.

        Args:
            weights: before the step, decayed.
        """
        gap = self.config.gap_steps
        if "merging_steps" not in state:
            state["merging_steps"] = torch.zeros((), dtype=torch.int64)
            if gap > 1:
                state["merging_delta"] = torch.zeros_like(parameter)
        state["merging_steps"] += 1
        step = int(state["merging_steps"])
        if step % gap:
            state["merging_delta"] += parameter
            parameter.add_(weights)
            return
        if gap > 1:
            weights -= state["merging_delta"]
            parameter += state["merging_delta"]
            state["merging_delta"].zero_()
        torch.add(weights, self._merged(name, parameter, step), out=parameter)

    def _merged(self, name: str, delta: Tensor, step: int) -> Tensor:
        config = self.config
        tau = self._taus[name] = self._taus[name].to(delta.device, delta.dtype)
        if config.method == "onties":
            return onties(delta, tau, alpha=config.alpha, reserve_rate=config.reserve_rate)
        generator = seeded(self.seed, "online merging", step, name, device=delta.device)
        rates = {"alpha": config.alpha, "reserve_rate": config.reserve_rate}
        return ondare(delta, tau, **rates, generator=generator, rescale=config.rescale)
