"""Settings of the evaluation that follows every training stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lightning_llm.data.config import DataConfig
from lightning_llm.settings import Buildable, option, refuse_below

RULES = ("best", "threshold", "first", "random")  # by which responses are kept (evaluation/selection.py)


@dataclass
class JudgeConfig(Buildable):
    """What all judges of single responses have in common: `build(JudgeContext)` makes a `Judge`."""

    name: str = "???"


@option("judge", "exact_answer")
@dataclass
class ExactAnswerConfig(JudgeConfig):
    """Whether the last line is exactly `answer: ` and the known answer."""

    implementation: ClassVar[str] = "lightning_llm.evaluation.judges:ExactAnswer"
    name: str = "exact_answer"


@option("judge", "random")
@dataclass
class RandomConfig(JudgeConfig):
    """A control: any number, the same whenever the same response is judged."""

    implementation: ClassVar[str] = "lightning_llm.evaluation.judges:RandomScore"
    name: str = "random"


@option("evaluation", "standard")
@dataclass
class EvaluationConfig:
    """What is measured on held-out rows after a training stage."""

    name: str = "standard"
    text: DataConfig = field(default_factory=DataConfig)  # perplexity by domain, loss by position
    tasks: DataConfig = field(default_factory=DataConfig)  # exact match of the last line `answer: ...`
    pairs: DataConfig = field(default_factory=DataConfig)  # preference accuracy and win rate
    text_tokens: int = 12_000  # per domain, at most
    long_documents: int = 16  # the first full context of each: loss by position, worth of the long context
    questions: int = 500
    preference_pairs: int = 200
    max_new_tokens: int = 48
    samples: int = 6  # conversations shown on the page

    def __post_init__(self):
        refuse_below(0, self, "long_documents", "questions", "preference_pairs", "samples")
        refuse_below(1, self, "text_tokens", "max_new_tokens")
