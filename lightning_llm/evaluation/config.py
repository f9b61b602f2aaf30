"""Settings of the evaluation that follows every training stage, and of judges."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from lightning_llm.data.config import DataConfig
from lightning_llm.settings import Buildable, came_later, option, refuse_below

RULES = ("best", "threshold", "first", "random")  # by which responses are kept (evaluation/selection.py)
SCORED = ("best", "threshold")  # those that go by scores

ANSWERS = ("greedy", "likelihood")  # to the question for a needle


@dataclass
class NeedleConfig:
    """Keys hidden in held-out text and asked for at its end, over lengths and depths (evaluation/needle.py)."""

    trials: int = 0  # keys at each length and depth; 0: nothing is hidden
    lengths: int = 4  # the stage's context, its half, its quarter and so on: so many of them
    depths: int = 10  # places of a key, from the beginning of the text to its end
    answer: str = "greedy"  # greedy (the key is spelt) | likelihood (it is likelier than all distractors)
    distractors: int = 9  # wrong keys that it has to be likelier than

    def __post_init__(self):
        refuse_below(0, self, "trials")
        refuse_below(1, self, "lengths", "depths", "distractors")
        if self.distractors > 1000:
            raise ValueError(f"distractors must be at most 1000, is {self.distractors}")
        if self.answer not in ANSWERS:
            raise ValueError(f"answer is {' or '.join(ANSWERS)}, is {self.answer!r}")


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
    comparisons: int = came_later(1000)  # held-out rows of its own data that a reward model is evaluated on
    needle: NeedleConfig = came_later(NeedleConfig())  # found again in a long text, or not

    def __post_init__(self):
        refuse_below(1, self, "comparisons")
        refuse_below(0, self, "long_documents", "questions", "preference_pairs", "samples")
        refuse_below(1, self, "text_tokens", "max_new_tokens")


# ---- judges: what a response is worth (evaluation/judges.py) ----


@dataclass
class JudgeConfig(Buildable):
    """What all judges have in common; `build(JudgeContext)` makes one."""

    name: str = "???"

    @property
    def needs_reward_model(self) -> bool:
        """Whether it asks a trained model, that the stage names in `judged_by`."""
        return False

    @property
    def needs_fields(self) -> tuple[str, ...]:
        """Fields that it goes by, of the row that a prompt comes from: of `answer` and `tests`."""
        return ()

    @property
    def tells_right(self) -> bool:
        """Whether a score says if a response is right, and does not only rank responses."""
        return True


@option("judge", "exact_answer")
@dataclass
class ExactAnswerConfig(JudgeConfig):
    """1 where the last line is `answer: ` and the known answer, else 0."""

    implementation: ClassVar[str] = "lightning_llm.evaluation.verifiers:ExactAnswer"
    name: str = "exact_answer"

    @property
    def needs_fields(self) -> tuple[str, ...]:
        """The answer."""
        return ("answer",)


@option("judge", "format")
@dataclass
class FormatConfig(JudgeConfig):
    """1 where the whole response has the form that a regular expression says, else 0."""

    implementation: ClassVar[str] = "lightning_llm.evaluation.verifiers:Format"
    name: str = "format"
    pattern: str = r"(?s).*\n?answer: \S.*"

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern is no regular expression ({error})") from None


@option("judge", "unit_tests")
@dataclass
class UnitTestsConfig(JudgeConfig):
    """1 where the code of a response passes the question's tests, in a process that can do nothing else."""

    implementation: ClassVar[str] = "lightning_llm.evaluation.verifiers:UnitTests"
    name: str = "unit_tests"
    seconds: float = 5.0  # of a processor; of the clock twice as many, and ten in which the process may start
    memory_mib: int = 512
    file_mib: int = 1  # of any file that it writes, in a folder that goes with it
    processes: int = 2  # run at a time
    isolation: str = "kernel"  # kernel (seccomp and Landlock, of Linux) | limits (of time and memory only)

    def __post_init__(self):
        refuse_below(0.1, self, "seconds")
        refuse_below(1, self, "processes", "file_mib")
        refuse_below(64, self, "memory_mib")
        if self.isolation not in ("kernel", "limits"):
            raise ValueError(f"isolation is kernel or limits, is {self.isolation!r}")

    @property
    def needs_fields(self) -> tuple[str, ...]:
        """The tests."""
        return ("tests",)


@option("judge", "reward_model")
@dataclass
class RewardModelJudgeConfig(JudgeConfig):
    """The score of the reward models that `judged_by` names."""

    implementation: ClassVar[str] = "lightning_llm.evaluation.scores:RewardModelScore"
    name: str = "reward_model"
    ensemble: str = "mean"  # mean | min, of several reward models

    def __post_init__(self):
        if self.ensemble not in ("mean", "min"):
            raise ValueError(f"ensemble is mean or min, is {self.ensemble!r}")

    @property
    def needs_reward_model(self) -> bool:
        """Always."""
        return True

    @property
    def tells_right(self) -> bool:
        """Never: a score is known up to a constant of its prompt."""
        return False


@option("judge", "length")
@dataclass
class LengthConfig(JudgeConfig):
    """What length costs: 0 up to `free` tokens, then minus `per_token` for each."""

    implementation: ClassVar[str] = "lightning_llm.evaluation.scores:LengthShaping"
    name: str = "length"
    free: int = 0
    per_token: float = 0.01
    cut_off: float = 0.0  # what a response costs that was cut off, besides

    def __post_init__(self):
        refuse_below(0, self, "free", "per_token", "cut_off")

    @property
    def tells_right(self) -> bool:
        """Never."""
        return False


@option("judge", "random")
@dataclass
class RandomConfig(JudgeConfig):
    """A control: any number, the same whenever the same response is judged."""

    implementation: ClassVar[str] = "lightning_llm.evaluation.scores:RandomScore"
    name: str = "random"

    @property
    def tells_right(self) -> bool:
        """Never."""
        return False


@option("judge", "substring")
@dataclass
class SubstringConfig(JudgeConfig):
    """1 where the answer stands anywhere in the response: a reward that can be hacked, by saying everything."""

    implementation: ClassVar[str] = "lightning_llm.evaluation.scores:Substring"
    name: str = "substring"

    @property
    def needs_fields(self) -> tuple[str, ...]:
        """The answer."""
        return ("answer",)


@dataclass
class WeightedPart:
    """One judge of several."""

    weight: float = 1.0
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@option("judge", "weighted")
@dataclass
class WeightedConfig(JudgeConfig):
    """The weighted sum of other judges' scores."""

    implementation: ClassVar[str] = "lightning_llm.evaluation.scores:WeightedSum"
    name: str = "weighted"
    parts: dict[str, WeightedPart] = field(default_factory=dict)

    @property
    def needs_reward_model(self) -> bool:
        """If a part of it does."""
        return any(part.judge.needs_reward_model for part in self.parts.values())

    @property
    def needs_fields(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(dict.fromkeys(field for part in self.parts.values() for field in part.judge.needs_fields))

    @property
    def tells_right(self) -> bool:
        """If a part of it does and none asks a reward model, whose constant would move the sum."""
        return not self.needs_reward_model and any(part.judge.tells_right for part in self.parts.values())
