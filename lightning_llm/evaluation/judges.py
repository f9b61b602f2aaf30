"""Which responses are right, and which of two is better: verifiers and judges, used wherever responses are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lightning_llm.data.embedded import tasks
from lightning_llm.evaluation.config import ExactAnswerConfig, RandomConfig
from lightning_llm.settings import UserError


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is known."""

    task: str
    prompt: str  # what the user says, for people to read
    prompt_ids: list[int]  # the rendered conversation, up to where the assistant is to speak
    answer: str
    tests: str | None = None  # unit tests of a coding question


@dataclass(frozen=True)
class Response:
    """What a model said to a question."""

    ids: list[int]  # with the token that ended the turn, if there is one
    text: str  # without it
    is_complete: bool  # the model ended its turn; otherwise it was cut off


@dataclass(frozen=True)
class Verdict:
    """What a judge makes of a response; more is better."""

    score: float
    parts: dict[str, float] = field(default_factory=dict)  # by judge's name, where several have a say


class Judge(Protocol):
    """Scores responses one by one, many at a time."""

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """A verdict on each pair of question and response."""
        ...


@dataclass(frozen=True)
class JudgeContext:
    """What a judge knows only when it runs."""

    reward_models: list[Path]  # directories, in the order in which the recipe names them
    device: str
    max_tokens: int  # that it may hold at once
    seed: int


@dataclass(frozen=True)
class ExactAnswer:
    """1 where the last line is the answer, else 0."""

    config: ExactAnswerConfig
    context: JudgeContext

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """See `Judge`.

        Raises:
            UserError: nobody knows an answer.
        """
        if asked := next((question for question in questions if not question.answer), None):
            what = f"compares with the answer, and none is known to {asked.prompt[:40]!r}"
            raise UserError("judge exact_answer", what, "Give the rows an answer, or choose another judge")
        return [Verdict(float(verify(*pair))) for pair in zip(questions, responses, strict=True)]


@dataclass(frozen=True)
class RandomScore:
    """A number in [0, 1) that depends on seed, question and response, and on nothing that makes one better."""

    config: RandomConfig
    context: JudgeContext

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """See `Judge`."""
        return [Verdict(self._score(*pair)) for pair in zip(questions, responses, strict=True)]

    def _score(self, question: Question, response: Response) -> float:
        text = f"{self.context.seed}\0{question.prompt}\0{response.text}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


def verify(question: Question, response: Response) -> bool:
    """Whether the last line is exactly `answer: ` and the known answer. What was cut off has no last line: wrong."""
    return response.is_complete and tasks.score({"answer": question.answer}, response.text)


@dataclass(frozen=True)
class StyleAndCorrectness:
    """A wrong response has lost; of two right ones that in the preferred style wins, and equal ones tie.

    Where both are wrong both have lost and nobody has won, so no policy gains by style alone, and one half is what a
    model reaches against itself. How often that happens belongs beside any win rate (`judge/both_wrong`).
    """

    preferred: str = "working"

    def compare(self, question: Question, response: Response, other: Response) -> float | None:
        """1 if `response` wins, 0 if `other` does, 0.5 for a tie of two right ones, None if both have lost."""
        merit, other_merit = self._merit(question, response), self._merit(question, other)
        if not merit and not other_merit:
            return None
        return 0.5 if merit == other_merit else float(merit > other_merit)

    def _merit(self, question: Question, response: Response) -> int:
        """0 for wrong, 1 for right, 2 for right in the preferred style."""
        return verify(question, response) * (1 + (tasks.style_of(response.text) == self.preferred))
