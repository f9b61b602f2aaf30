"""Settings of the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_llm.settings import Buildable, option


@dataclass
class ObjectiveConfig(Buildable):
    """What all objectives have in common."""

    name: str = "???"
    needs_pairs: ClassVar[bool] = False  # a row is a prompt with a chosen and a rejected response
    needs_reference: ClassVar[bool] = False  # wants the column of a `<stage>.reference` node


@option("objective", "causal_lm")
@dataclass
class CausalLMConfig(ObjectiveConfig):
    """Next-token prediction on the tokens that the data marks as targets."""

    implementation: ClassVar[str] = "lightning_llm.objectives.causal_lm:CausalLM"
    name: str = "causal_lm"


@dataclass
class PreferenceConfig(ObjectiveConfig):
    """What DPO and IPO share."""

    needs_pairs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    beta: float = 0.1  # > 0; pull towards the reference
    nll_weight: float = 0.0  # >= 0; added negative log-likelihood of the chosen response, per token
    mask_formatting: bool = False  # leave formatting tokens out of both log-ratios (Llama 3, section 4.1.4)

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.nll_weight < 0:
            raise ValueError(f"nll_weight must not be negative, got {self.nll_weight}")


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
