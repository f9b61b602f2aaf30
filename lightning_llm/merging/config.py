"""Settings of the ways in which a stage makes one model of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_llm.settings import Buildable, option

BLOCK = 2**16  # entries of each model that are merged at a time: what is computed of them stays in the cache


@dataclass
class MergeConfig(Buildable):
    """What all ways have in common; `build(states, start, seed)` gives the merged state, computed as it is read."""

    needs_start: ClassVar[bool] = True  # merges what models have learnt since a common beginning: `starts_from`
    needs_scores: ClassVar[bool] = False  # is for reward models
    draws: ClassVar[bool] = False  # the seed decides
    passes: ClassVar[int] = 0  # over all models, before the one in which they are merged
    fewest: ClassVar[int] = 1  # models
    most: ClassVar[int | None] = None

    name: str = "???"

    def refuse(self, models: int) -> None:
        """Refuse a number of models that it cannot merge.

        Raises:
            ValueError: says which it can; a second argument is the remedy, where that is not another method.
        """
        if models < self.fewest or (self.most is not None and models > self.most):
            wanted = f"exactly {self.most}" if self.most == self.fewest else f"at least {self.fewest}"
            raise ValueError(f"names {models}, and {self.name} merges {wanted}")


@option("merge", "linear")
@dataclass
class LinearConfig(MergeConfig):
    """The weighted mean. Llama 3 averages models of different data and settings after every step (4.1.5)."""

    implementation: ClassVar[str] = "lightning_llm.merging.methods:merge_linear"
    needs_start: ClassVar[bool] = False
    fewest: ClassVar[int] = 2
    name: str = "linear"
    weights: list[float] | None = None  # of the models, in their order, adding up to 1; none: all the same

    def refuse(self, models: int) -> None:
        """Also weights that are not those of so many models."""
        super().refuse(models)
        if self.weights is not None and len(self.weights) != models:
            raise ValueError(f"names {models}, and method.weights are {len(self.weights)}", "Give each model a weight")

    def __post_init__(self):
        if self.weights is not None and not abs(sum(self.weights) - 1) <= 1e-6:
            raise ValueError(f"weights must add up to 1, got {sum(self.weights):g}")


@option("merge", "warm")
@dataclass
class WarmConfig(MergeConfig):
    """The mean of reward models that began as one (Ramé et al. 2024): more robust than one, as cheap as one.

    Siblings by `seed_offset` begin as one, with one head; so do reward models that go on from one.
    """

    implementation: ClassVar[str] = "lightning_llm.merging.methods:merge_warm"
    needs_start: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = True
    fewest: ClassVar[int] = 2
    name: str = "warm"


@option("merge", "slerp")
@dataclass
class SlerpConfig(MergeConfig):
    """Along the arc between task vectors, an angle for each layer (WARP, Ramé et al. 2024)."""

    implementation: ClassVar[str] = "lightning_llm.merging.methods:merge_slerp"
    fewest: ClassVar[int] = 2
    passes: ClassVar[int] = 1  # for the angles
    name: str = "slerp"
    t: float | None = None  # of two models: how near the second is; none: 1 / M

    def refuse(self, models: int) -> None:
        """Also a place on the arc of more than two."""
        super().refuse(models)
        if self.t is not None and models > 2:
            raise ValueError(f"names {models}, and method.t is a place between two", "Take method.t away")

    def __post_init__(self):
        _share(self, "t")


@option("merge", "task_arithmetic")
@dataclass
class TaskArithmeticConfig(MergeConfig):
    """The sum of task vectors (Ilharco et al. 2022)."""

    implementation: ClassVar[str] = "lightning_llm.merging.methods:merge_task_arithmetic"
    name: str = "task_arithmetic"
    scale: float = 0.4  # of the sum; 1 / M makes it the mean, a negative one unlearns


@option("merge", "ties")
@dataclass
class TiesConfig(MergeConfig):
    """Trimmed task vectors, without those entries that disagree on the sign (Yadav et al. 2023)."""

    implementation: ClassVar[str] = "lightning_llm.merging.methods:merge_ties"
    passes: ClassVar[int] = 1  # for the thresholds, where a sample tells about where they are
    name: str = "ties"
    density: float = 0.2  # share of a task vector that is kept: the largest entries of the whole model
    scale: float = 1.0  # of what is merged

    def __post_init__(self):
        _share(self, "density", positive=True)


@option("merge", "dare")
@dataclass
class DareConfig(MergeConfig):
    """The sum of task vectors of which a random part is kept and rescaled (Yu et al. 2023)."""

    implementation: ClassVar[str] = "lightning_llm.merging.methods:merge_dare"
    draws: ClassVar[bool] = True
    name: str = "dare"
    density: float = 0.1  # share of a task vector that is kept
    scale: float = 0.5  # of the sum

    def __post_init__(self):
        _share(self, "density", positive=True)


@option("merge", "liti")
@dataclass
class LitiConfig(MergeConfig):
    """Of one model: part of the way from where it began (WARP's linear interpolation towards the initialisation)."""

    implementation: ClassVar[str] = "lightning_llm.merging.methods:merge_liti"
    most: ClassVar[int | None] = 1
    name: str = "liti"
    eta: float = 0.3  # how much of the way is kept

    def __post_init__(self):
        _share(self, "eta")


def _share(config: MergeConfig, name: str, *, positive: bool = False) -> None:
    value = getattr(config, name)
    if value is not None and not (0 < value <= 1 or (value == 0 and not positive)):
        raise ValueError(f"{name} must lie in {'(' if positive else '['}0, 1], got {value:g}")
