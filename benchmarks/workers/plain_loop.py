"""The loop around a peer's model that anybody would write: backward, clip, fused AdamW with our settings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from calls import Calls
from torch import Tensor, nn

IGNORED = -100  # a label that does not count


def train(calls: Calls, model: nn.Module, loss_of: Callable[[int], Tensor]) -> None:
    """One call is one step on batch `index`."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=calls.settings["learning_rate"],
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True,
    )
    for index in calls:
        loss = loss_of(index)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        calls.done(loss=loss.item())
