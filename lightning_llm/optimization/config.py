"""Settings of the optimizers and of the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lightning_llm.settings import AS_BEFORE, Buildable, came_later, option

SCHEDULES = ("constant", "linear", "cosine", "wsd")
PRECISIONS = ("bf16", "fp32")
UPDATE_SCALES = ("adamw", "spectral")
ONLINE_MERGING = ("none", "ondare", "onties")


@dataclass
class OnlineMergingConfig:
    """Each step is merged with what a reference has learnt since its base (optimization/online_merging.py).

    The paper (arXiv 2405.17931) sweeps alpha from 1e-7 to 1e-4, 1e-6 being near the best, and reserve rates down to
    5e-4 (table 2, section 5.3); its code has 0.01. Without rescaling a step is in the mean the reserve rate times the
    optimizer's: the learning rate wants to be raised by as much.
    """

    method: str = "none"  # none | ondare (a random part of the entries) | onties (the largest, by consensus of signs)
    base: str | None = None  # what the reference was trained from: a stage, an artifact or a directory
    reference: str | None = None  # the same; none: what the stage starts from
    alpha: float = 1e-6  # weight of what the reference has learnt, in [0, 1]
    reserve_rate: float = 0.01  # share of the entries that is kept, in (0, 1]
    gap_steps: int = 1  # steps between two merges; those in between are plain
    rescale: bool = False  # ondare: divide what is kept by the reserve rate

    def __post_init__(self):
        if self.method not in ONLINE_MERGING:
            raise ValueError(f"method must be one of {', '.join(ONLINE_MERGING)}, got {self.method!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha:g}")
        if not 0 < self.reserve_rate <= 1:
            raise ValueError(f"reserve_rate must lie in (0, 1], got {self.reserve_rate:g}")
        if self.gap_steps < 1:
            raise ValueError(f"gap_steps must be at least 1, got {self.gap_steps}")
        if self.rescale and self.method == "onties":
            raise ValueError("rescale is for ondare: onties keeps the largest entries, which is no draw")

    @property
    def is_on(self) -> bool:
        """Whether anything is merged."""
        return self.method != "none"

    @property
    def bytes_of_state(self) -> int:
        """What is kept of each parameter: the task vector, the weights during a step, the sum of plain steps."""
        return 0 if not self.is_on else 8 if self.gap_steps == 1 else 12


@dataclass
class OptimizerConfig(Buildable):
    """What all optimizers have in common. Decay is decoupled and on matrices alone, not on norms and biases."""

    bytes_of_state: ClassVar[int] = 8  # that are remembered of each parameter, whatever the precision of products
    bytes_of_matrix_state: ClassVar[int | None] = None  # of one in the layers' matrices; none: the same
    decay_follows_rate: ClassVar[bool] = True  # decay is multiplied by the learning rate; else by its schedule alone

    name: str = "???"
    weight_decay: float = 0.1  # a step takes lr * weight_decay of a weight away, where the optimizer says nothing else
    clip_norm: float = 1.0  # of the whole gradient; 0: no clipping
    online_merging: OnlineMergingConfig = field(
        default_factory=OnlineMergingConfig, metadata={AS_BEFORE: OnlineMergingConfig()}
    )

    def __post_init__(self):
        for name in ("weight_decay", "clip_norm", "eps"):
            if getattr(self, name, 0.0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        betas = getattr(self, "betas", (0.0, 0.0))
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(betas)}")

    @classmethod
    def state_bytes(cls, parameters: int, matrices: int) -> int:
        """Memory of the state, a step's count per tensor left aside.

        Args:
            parameters: all that are trained.
            matrices: those among them that are in matrices of the layers.
        """
        of_matrix = cls.bytes_of_state if cls.bytes_of_matrix_state is None else cls.bytes_of_matrix_state
        return cls.bytes_of_state * (parameters - matrices) + of_matrix * matrices


@dataclass
class MuParamConfig:
    """The learning rate of a matrix shrinks with the model's width (lightning_llm/optimization/mu_param.py)."""

    base_width: int | None = None  # where the learning rate was tuned; none: the same rate for every width

    def __post_init__(self):
        if self.base_width is not None and self.base_width <= 0:
            raise ValueError(f"base_width must be positive, got {self.base_width}")


@dataclass
class EntrywiseConfig(OptimizerConfig):
    """Optimizers that move each entry by about the learning rate, however large its gradient is.

    Their effect on activations grows with the width of the model, which `mu_param` takes back.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    mu_param: MuParamConfig = field(default_factory=MuParamConfig, metadata={AS_BEFORE: MuParamConfig()})


@option("optimizer", "adamw")
@dataclass
class AdamWConfig(EntrywiseConfig):
    """AdamW (Loshchilov & Hutter 2019), fused."""

    implementation: ClassVar[str] = "lightning_llm.optimization.optimizers:build_adamw"
    bytes_of_state: ClassVar[int] = 8  # two moments
    name: str = "adamw"
    eps: float = 1e-8


@option("optimizer", "lion")
@dataclass
class LionConfig(EntrywiseConfig):
    """Lion (Chen et al. 2023): half of AdamW's state; wants a third to a tenth of its rate, and as much more decay."""

    implementation: ClassVar[str] = "lightning_llm.optimization.optimizers:build_lion"
    bytes_of_state: ClassVar[int] = 4  # a momentum
    name: str = "lion"
    betas: tuple[float, float] = (0.9, 0.99)  # of the update, of the momentum
    weight_decay: float = 0.3


@option("optimizer", "afm_rmsprop")
@dataclass
class AFMRMSPropConfig(EntrywiseConfig):
    """RMSProp with momentum as AFM was trained with (Apple 2024): its decay follows the schedule, not the rate."""

    implementation: ClassVar[str] = "lightning_llm.optimization.optimizers:build_afm_rmsprop"
    bytes_of_state: ClassVar[int] = 8  # squares and a momentum
    decay_follows_rate: ClassVar[bool] = False
    name: str = "afm_rmsprop"
    betas: tuple[float, float] = (0.95, 0.95)  # of the momentum, of the squares
    eps: float = 1e-30  # added to the square of the gradient
    update_clip: float = 1.0  # upper bound of a parameter's root mean square update, before momentum; 0: none
    weight_decay: float = 3.16e-4  # a step takes schedule / peak * weight_decay of a weight away, whatever the peak is

    def __post_init__(self):
        super().__post_init__()
        if self.update_clip < 0:
            raise ValueError(f"update_clip must not be negative, got {self.update_clip}")


@option("optimizer", "muon")
@dataclass
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024) on the matrices of the layers, AdamW on embedding, head, norms and biases."""

    implementation: ClassVar[str] = "lightning_llm.optimization.optimizers:build_muon"
    bytes_of_state: ClassVar[int] = 8  # AdamW's
    bytes_of_matrix_state: ClassVar[int | None] = 4  # a momentum
    name: str = "muon"
    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    newton_schulz_precision: str = "bf16"  # bf16 (as published) | fp32
    update_scale: str = "adamw"  # adamw (the size of AdamW's updates: one rate for all) | spectral (Jordan's)
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW, as the next two
    eps: float = 1e-8
    adamw_lr_scale: float = 1.0  # AdamW's rate as a share of the schedule's; with `spectral` some 0.02

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.newton_schulz_steps < 1:
            raise ValueError(f"newton_schulz_steps must be at least 1, got {self.newton_schulz_steps}")
        if self.adamw_lr_scale < 0:
            raise ValueError(f"adamw_lr_scale must not be negative, got {self.adamw_lr_scale}")
        for name, known in (("newton_schulz_precision", PRECISIONS), ("update_scale", UPDATE_SCALES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@option("schedule", "learning_rate")
@dataclass
class LearningRateConfig:
    """Learning rate as a function of consumed tokens (lightning_llm/schedules.py)."""

    schedule: str = "cosine"  # constant | linear | cosine | wsd
    peak: float | None = 3e-4  # none: the rate with which the training that it starts from has ended
    final: float | None = None  # absolute
    warmup_tokens: float | None = None  # at most one of the three warm-ups
    warmup_steps: float | None = None
    warmup_share: float | None = None  # of the stage's tokens
    decay_share: float = 0.2  # wsd: the last share of the tokens in which the rate falls
    stretch: float = came_later(1.0)  # as in a stage so many times as long: at 2 the stage is the first half of it
    # of the peak, where final has no value; none: 0 for linear and wsd, a tenth for cosine, all for constant
    final_share: float | None = came_later(None)

    def __post_init__(self):
        if not self.stretch >= 1:
            raise ValueError(f"stretch must be at least 1, got {self.stretch:g}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.peak is not None and self.peak < 0:
            raise ValueError(f"peak must not be negative, got {self.peak}")
