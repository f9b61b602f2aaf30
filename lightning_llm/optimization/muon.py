"""Muon: momentum made orthogonal, so that an update moves all directions of a matrix alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steep at 0, so that five steps do
SMALLEST_NORM = 1e-7
BATCH_ENTRIES = 2**26  # of matrices that are made orthogonal together: bounds the memory that it takes


def orthogonalised(matrices: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """Matrices with about the same singular vectors, and singular values near 1 (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon): Newton-Schulz on X = M / |M|, `steps` times

        A = X X^T,  X <- a X + (b A + c A A) X,   a, b, c = 3.4445, -4.7750, 2.0315

    which maps each singular value s to a s + b s^3 + c s^5. Five steps bring what is above 0.01 of |M| to [0.7, 1.2].

    Args:
        matrices: [N, r, c]; all are worked on at once.
        dtype: of the products.

    Returns:
        [N, r, c] in `dtype`.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)  # the smaller of the two products with itself
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def update_size(rows: int, columns: int, scale: str) -> float:
    """What an orthogonal [rows, columns] matrix is multiplied with, besides the learning rate.

    "spectral": sqrt(max(1, rows / columns)), Jordan's: outputs move by about the learning rate.
    "adamw": 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, arXiv 2502.16982, eq. 4): entries move as far as AdamW's
    do, so that both share learning rate and decay.
    """
    return math.sqrt(max(1.0, rows / columns)) if scale == "spectral" else 0.2 * math.sqrt(max(rows, columns))


class Muon(torch.optim.Optimizer):
    """Muon on the groups that say `parts`, AdamW (fused) on the others: one optimizer for a whole model.

    With gradient g, momentum u and O(.) = `orthogonalised` on every matrix of a parameter:
        m     <- u m + (1 - u) g
        d     <- u m + (1 - u) g with Nesterov's momentum, else m
        theta <- theta - lr (update_size O(d) + weight_decay theta)

    A parameter [n, r, c] holds n matrices. One that is several matrices on top of each other, as queries, keys and
    values are, is taken apart: `parts` of its group gives their rows.

    State of a parameter: `momentum_buffer` (m, of its shape); under AdamW `step`, `exp_avg`, `exp_avg_sq`.
    """

    def __init__(
        self,
        params: Any,
        *,
        momentum: float,
        nesterov: bool,
        steps: int,
        dtype: torch.dtype,
        scale: str,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ):
        self.momentum, self.nesterov = momentum, nesterov
        self.steps, self.dtype, self.scale = steps, dtype, scale
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay, "parts": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the loss of `closure`, if there is one."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        matrices: dict[tuple, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["parts"] is None:
                self._adamw(group, parameters)
                continue
            for parameter in parameters:
                direction = self._direction(parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                rows = group["parts"] or [parameter.shape[-2]]
                for target, part in zip(parameter.split(rows, -2), direction.split(rows, -2), strict=True):
                    matrices[*part.shape[-2:], group["lr"]].append((_stack(target), _stack(part)))
        for (rows, columns, lr), pairs in matrices.items():
            for few in _batches(pairs, rows * columns):
                updates = orthogonalised(torch.cat([part for _, part in few]), steps=self.steps, dtype=self.dtype)
                sizes = [len(part) for _, part in few]
                for (target, _), update in zip(few, updates.split(sizes), strict=True):
                    target.add_(update, alpha=-lr * update_size(rows, columns, self.scale))
        return loss

    def _direction(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        gradient: Tensor = parameter.grad  # pyright: ignore[reportAssignmentType]
        momentum.lerp_(gradient, 1 - self.momentum)
        return momentum.lerp(gradient, 1 - self.momentum) if self.nesterov else momentum

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros((), device=parameter.device),  # where the fused kernel wants it
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # pyright: ignore[reportArgumentType]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _stack(matrix: Tensor) -> Tensor:
    """[r, c] as [1, r, c]; [n, r, c] as it is. A view, so that writing to it writes to the parameter."""
    return matrix.unsqueeze(0) if matrix.ndim == 2 else matrix


def _batches(pairs: Sequence[tuple[Tensor, Tensor]], entries: int) -> list[Sequence[tuple[Tensor, Tensor]]]:
    """As many pairs at a time as BATCH_ENTRIES hold, at least one."""
    count = max(1, BATCH_ENTRIES // (entries * max(len(part) for _, part in pairs)))
    return [pairs[first : first + count] for first in range(0, len(pairs), count)]
