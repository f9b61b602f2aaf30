"""Settings of the objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from lightning_llm.data.config import GRADED
from lightning_llm.settings import Buildable, option, refuse_below


@dataclass
class ObjectiveConfig(Buildable):
    """What all objectives have in common."""

    name: str = "???"
    forms: ClassVar[tuple[str, ...]] = ("text", "conversations")  # of the data that it learns from
    needs_reference: ClassVar[bool] = False  # wants the column of a `<stage>.reference` node
    needs_teacher: ClassVar[bool] = False  # learns from the stage or model that `learns_from` names
    needs_samples: ClassVar[bool] = False  # learns from responses that the policy itself draws meanwhile
    is_scored: ClassVar[bool] = False  # what it trains is a reward model
    draws: ClassVar[bool] = False  # gives the model parameters of its own, by the recipe's seed


@option("objective", "causal_lm")
@dataclass
class CausalLMConfig(ObjectiveConfig):
    """Next-token prediction on the tokens that the data marks as targets."""

    implementation: ClassVar[str] = "lightning_llm.objectives.causal_lm:CausalLM"
    name: str = "causal_lm"


@option("objective", "pruning_masks")
@dataclass
class PruningMasksConfig(ObjectiveConfig):
    """Next-token prediction while hidden units are masked, and the masks learnt (AFM, arXiv 2407.21075)."""

    implementation: ClassVar[str] = "lightning_llm.objectives.pruning:PruningMasks"
    draws: ClassVar[bool] = True
    name: str = "pruning_masks"
    intermediate_size: int = 0  # hidden units that each feed-forward can have open at the end; a scale keeps its share
    temperature: float = 1.0  # of the masks at the begin, in standard deviations of a layer's scores
    final_temperature: float = 0.1  # at the end; geometric in between
    budget_ramp: float = 0.5  # share of the stage in which the budget falls from all units to `intermediate_size`
    train_weights: bool = True  # false: the masks alone learn

    def __post_init__(self):
        for name in ("temperature", "final_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, is {getattr(self, name):g}")
        if not 0 <= self.budget_ramp <= 1:
            raise ValueError(f"budget_ramp is a share in [0, 1], is {self.budget_ramp:g}")


@option("objective", "distillation")
@dataclass
class DistillationConfig(ObjectiveConfig):
    """A teacher's next token beside the true one. AFM on-device: its likeliest, 0.9; Gemma 2: all it expects, 1."""

    implementation: ClassVar[str] = "lightning_llm.objectives.distillation:Distillation"
    needs_teacher: ClassVar[bool] = True
    name: str = "distillation"
    targets: str = "top1"  # top1 | top_k (a node `<stage>.teacher` keeps either) | full (asked in every step)
    teacher_weight: float = 0.9  # in [0, 1]; the rest is the true label's
    k: int = 64  # of top_k: ids that are kept of each token, beside the label and the mass of all others
    stored_as: str = "float16"  # of top_k's log-probabilities: float16 | uint8
    direction: str = "forward"  # of full: forward | reverse | jensen_shannon
    beta: float = 0.5  # of jensen_shannon, in (0, 1): towards 0 forward, towards 1 reverse
    temperature: float = 1.0  # > 0; of both, the loss times its square (Hinton et al. 2015)

    def __post_init__(self):
        refuse_below(1, self, "k")
        for name, known in (
            ("targets", ("top1", "top_k", "full")),
            ("stored_as", ("float16", "uint8")),
            ("direction", ("forward", "reverse", "jensen_shannon")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {', '.join(known[:-1])} or {known[-1]}, is {getattr(self, name)!r}")
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight lies in [0, 1], is {self.teacher_weight:g}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta lies in (0, 1), is {self.beta:g}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, is {self.temperature:g}")
        if self.direction != "forward" and self.targets != "full":
            raise ValueError(
                f"direction is {self.direction}, and {self.targets} knows forward alone; targets=full knows all"
            )
        if self.temperature != 1 and (self.targets == "top1" or (self.targets == "top_k" and self.teacher_weight != 1)):
            raise ValueError(
                f"temperature is {self.temperature:g}, and with {self.targets} it would be the label's as well; "
                "targets=full, or top_k with teacher_weight=1, keep them apart"
            )

    @property
    def is_kept(self) -> bool:
        """Whether what the teacher says is computed once, before the student trains."""
        return self.targets != "full"


@dataclass
class PreferenceConfig(ObjectiveConfig):
    """What DPO and IPO share."""

    forms: ClassVar[tuple[str, ...]] = ("pairs",)
    needs_reference: ClassVar[bool] = True
    beta: float = 0.1  # > 0; pull towards the reference
    nll_weight: float = 0.0  # >= 0; added negative log-likelihood of the chosen response, per token
    mask_formatting: bool = False  # leave formatting tokens out of both log-ratios (Llama 3, section 4.1.4)

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be a positive number, got {self.beta}")
        refuse_below(0, self, "nll_weight")


@option("objective", "dpo")
@dataclass
class DPOConfig(PreferenceConfig):
    """Direct preference optimisation. Llama 3: beta 0.1, nll_weight 0.2, mask_formatting."""

    implementation: ClassVar[str] = "lightning_llm.objectives.dpo:DPO"
    name: str = "dpo"
    label_smoothing: float = 0.0  # in [0, 0.5)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")


@option("objective", "ipo")
@dataclass
class IPOConfig(PreferenceConfig):
    """Identity preference optimisation (Azar et al. 2023)."""

    implementation: ClassVar[str] = "lightning_llm.objectives.dpo:IPO"
    name: str = "ipo"


@option("objective", "reward_model")
@dataclass
class RewardModelConfig(ObjectiveConfig):
    """A reward model from comparisons: Llama 3's loss, Llama 2's with margins, or AFM's soft labels with gradings."""

    implementation: ClassVar[str] = "lightning_llm.objectives.reward_model:RewardModelling"
    forms: ClassVar[tuple[str, ...]] = ("rankings",)
    is_scored: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    name: str = "reward_model"
    loss: str = "bradley_terry"  # bradley_terry | soft_labels (targets by the strength of the preference)
    margins: str | None = None  # small | large: by strength, for bradley_terry (Llama 2, table 27)
    graded: list[str] = field(default_factory=list)  # what people grade in single responses; each gets a head
    grading_weight: float = 0.1  # >= 0; of the grades' loss beside that of the comparisons
    centre_weight: float = 0.0  # >= 0; of (chosen + rejected)^2, which keeps scores around 0

    def __post_init__(self):
        refuse_below(0, self, "grading_weight", "centre_weight")
        if self.loss not in ("bradley_terry", "soft_labels"):
            raise ValueError(f"loss is bradley_terry or soft_labels, is {self.loss!r}")
        if self.margins not in (None, "small", "large"):
            raise ValueError(f"margins is null, small or large, is {self.margins!r}")
        if self.margins is not None and self.loss != "bradley_terry":
            raise ValueError("margins go with loss=bradley_terry; soft_labels have the strength in their targets")
        if unknown := sorted(set(self.graded) - set(GRADED)):
            raise ValueError(f"graded has {unknown[0]!r}; known are {', '.join(GRADED)}")


@dataclass
class PolicyConfig(ObjectiveConfig):
    """What the policy gradients share: responses that the policy has drawn, judged, and weighed within each prompt."""

    forms: ClassVar[tuple[str, ...]] = ("questions",)
    needs_samples: ClassVar[bool] = True
    beta: float = 0.05  # >= 0; reward that a nat of KL to the reference costs

    def __post_init__(self):
        refuse_below(0, self, "beta")


@dataclass
class ClippedConfig(PolicyConfig):
    """Those that clip the ratio of policy and iterate."""

    clip_low: float = 0.2  # in (0, 1]; the ratio earns nothing below 1 - clip_low
    clip_high: float = 0.2  # > 0; nor above 1 + clip_high

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low must lie in (0, 1], is {self.clip_low:g}")
        if not 0 < self.clip_high < math.inf:
            raise ValueError(f"clip_high must be a positive number, is {self.clip_high:g}")


@option("objective", "mdpo")
@dataclass
class MDPOConfig(PolicyConfig):
    """Mirror-descent policy optimisation with leave-one-out advantages (AFM's MDLOO)."""

    implementation: ClassVar[str] = "lightning_llm.objectives.policy:MDPO"
    name: str = "mdpo"
    gamma: float = 0.1  # >= 0; 1 / the step size: what a nat of KL to the iterate costs
    trust_region: str = "sequence"  # sequence (a response is one action) | token (the sum over its tokens)

    def __post_init__(self):
        super().__post_init__()
        refuse_below(0, self, "gamma")
        if self.trust_region not in ("sequence", "token"):
            raise ValueError(f"trust_region is sequence or token, is {self.trust_region!r}")


@option("objective", "rloo")
@dataclass
class RLOOConfig(PolicyConfig):
    """REINFORCE with leave-one-out advantages."""

    implementation: ClassVar[str] = "lightning_llm.objectives.policy:RLOO"
    name: str = "rloo"


@option("objective", "ppo")
@dataclass
class PPOConfig(ClippedConfig):
    """The clipped surrogate with leave-one-out advantages, and no critic."""

    implementation: ClassVar[str] = "lightning_llm.objectives.policy:PPO"
    name: str = "ppo"
    ratio: str = "token"  # token | sequence: what is clipped

    def __post_init__(self):
        super().__post_init__()
        if self.ratio not in ("token", "sequence"):
            raise ValueError(f"ratio is token or sequence, is {self.ratio!r}")


@option("objective", "grpo")
@dataclass
class GRPOConfig(ClippedConfig):
    """Group relative policy optimisation: rewards in units of their prompt's deviation, the KL in the loss."""

    implementation: ClassVar[str] = "lightning_llm.objectives.policy:GRPO"
    name: str = "grpo"
    kl_estimator: str = "k3"  # k1 | k2 | k3, of each token (lightning_llm/losses/policy.py)

    def __post_init__(self):
        super().__post_init__()
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator is k1, k2 or k3, is {self.kl_estimator!r}")


@option("objective", "dapo")
@dataclass
class DAPOConfig(ClippedConfig):
    """GRPO without KL, clipped less above than below, every token of a step alike."""

    implementation: ClassVar[str] = "lightning_llm.objectives.policy:DAPO"
    name: str = "dapo"
    beta: float = 0.0
    clip_high: float = 0.28
