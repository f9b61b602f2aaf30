"""RMSProp with momentum, as AFM was trained with: updates of bounded size, decay that follows the schedule alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class AFMRMSProp(torch.optim.Optimizer):
    """RMSProp with momentum and decoupled decay (Gunter et al. 2024, arXiv 2407.21075, section 3.2.4; details as in the
    trainer that its authors have published).

    With gradient g (its global norm clipped before), betas b1 and b2, step t, and s = schedule / peak in [0, 1]:
        v     <- b2 v + (1 - b2) (g^2 + eps)
        u     <- g / sqrt(v / (1 - b2^t))
        u     <- u / max(1, rms(u) / update_clip)         rms over the parameter
        m     <- b1 m + (1 - b1) u                        no correction of its start
        theta <- theta - lr m - s weight_decay theta      the decay is not multiplied by the learning rate

    s comes with each step as the group's `schedule` (optimization/window.py); muParam's scale is in lr alone.

    State of a parameter: `step` (t, []), `exp_avg_sq` (v) and `exp_avg` (m), both of the parameter's shape.
    """

    def __init__(
        self, params: Any, *, betas: tuple[float, float], eps: float, update_clip: float, weight_decay: float = 0.0
    ):
        defaults = {"lr": 0.0, "schedule": 1.0, "betas": betas, "eps": eps, "update_clip": update_clip}
        super().__init__(params, defaults | {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the loss of `closure`, if there is one."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            kept = 1 - group["schedule"] * group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())  # on the host, as torch's own optimizers have it
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                    state["exp_avg"] = torch.zeros_like(parameter)
                state["step"] += 1
                squares: Tensor = state["exp_avg_sq"]
                squares.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                squares.add_((1 - beta2) * group["eps"])
                correction = 1 - beta2 ** float(state["step"])
                update = (squares / correction).rsqrt_().mul_(parameter.grad)
                if group["update_clip"]:
                    size = torch.linalg.vector_norm(update) / update.numel() ** 0.5
                    update.div_((size / group["update_clip"]).clamp_(min=1.0))
                state["exp_avg"].lerp_(update, 1 - beta1)
                parameter.mul_(kept).add_(state["exp_avg"], alpha=-group["lr"])
        return loss
