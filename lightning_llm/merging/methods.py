"""From a setting to the merge that it names. `start`, where all models began, is there if the setting needs it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_llm.merging.averaging import linear, liti
from lightning_llm.merging.config import (
    DareConfig,
    LinearConfig,
    LitiConfig,
    SlerpConfig,
    TaskArithmeticConfig,
    TiesConfig,
    WarmConfig,
)
from lightning_llm.merging.spherical import slerp_task_vectors
from lightning_llm.merging.states import LazyState, State
from lightning_llm.merging.task_vectors import dare, task_arithmetic, ties


def merge_linear(config: LinearConfig, states: Sequence[State], start: State | None, seed: int) -> LazyState:
    """The weighted mean."""
    return linear.lazily(states, config.weights)


def merge_warm(config: WarmConfig, states: Sequence[State], start: State | None, seed: int) -> LazyState:
    """The mean, of reward models."""
    return linear.lazily(states)


def merge_slerp(config: SlerpConfig, states: Sequence[State], start: State, seed: int) -> LazyState:
    """The arc between task vectors."""
    return slerp_task_vectors.lazily(start, states, config.t)


def merge_task_arithmetic(config: TaskArithmeticConfig, states: Sequence[State], start: State, seed: int) -> LazyState:
    """The sum of task vectors."""
    return task_arithmetic.lazily(start, states, config.scale)


def merge_ties(config: TiesConfig, states: Sequence[State], start: State, seed: int) -> LazyState:
    """Trimmed and elected task vectors."""
    return ties.lazily(start, states, config.density, config.scale)


def merge_dare(config: DareConfig, states: Sequence[State], start: State, seed: int) -> LazyState:
    """The sum of random parts of task vectors."""
    return dare.lazily(start, states, config.density, config.scale, seed)


def merge_liti(config: LitiConfig, states: Sequence[State], start: State, seed: int) -> LazyState:
    """Part of the way from the start."""
    [merged] = states
    return liti.lazily(start, merged, config.eta)
