"""Settings of the optimizer and of the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_llm.settings import Buildable, option

SCHEDULES = ("constant", "linear", "cosine", "wsd")


@option("optimizer", "adamw")
@dataclass
class AdamWConfig(Buildable):
    """AdamW (Loshchilov & Hutter 2019), fused; decay on matrices only."""

    implementation: ClassVar[str] = "lightning_llm.optimization.optimizers:build_adamw"
    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # of the whole gradient; 0: no clipping

    def __post_init__(self):
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        for name in ("eps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@option("schedule", "learning_rate")
@dataclass
class LearningRateConfig:
    """Learning rate as a function of consumed tokens (lightning_llm/schedules.py)."""

    schedule: str = "cosine"  # constant | linear | cosine | wsd
    peak: float = 3e-4
    final: float | None = None  # absolute; none: of the peak 0 for linear and wsd, a tenth for cosine, all for constant
    warmup_tokens: float | None = None  # at most one of the three warm-ups
    warmup_steps: float | None = None
    warmup_share: float | None = None  # of the stage's tokens
    decay_share: float = 0.2  # wsd: the last share of the tokens in which the rate falls

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.peak < 0:
            raise ValueError(f"peak must not be negative, got {self.peak}")
