"""What judges of responses have in common: questions and responses in, verdicts out.

A judge is asked by evaluation, by selection among samples and by training on a policy's own responses. Verifiers, which
know the answer, are in verifiers.py, everything else that gives a score in scores.py; here is the one judge that
compares two responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lightning_llm.data.embedded import tasks
from lightning_llm.settings import UserError


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is known."""

    task: str
    prompt: str  # what the user says, for people to read
    prompt_ids: list[int]  # the rendered conversation, up to where the assistant is to speak
    answer: str
    tests: str | None = None  # Python statements that fail unless the code of a response is right


@dataclass(frozen=True)
class Response:
    """What a model said to a question."""

    ids: list[int]  # with the token that ended the turn, if there is one
    text: str  # without it
    is_complete: bool  # the model ended its turn; otherwise it was cut off


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a response."""

    score: float  # the higher the better; 0 and 1 for wrong and right where that is the question
    parts: dict[str, float] = field(default_factory=dict)  # scores that it is made of, by name


class Judge(Protocol):
    """Anything that scores responses, many at a time."""

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """One verdict for each question with its response."""
        ...


@dataclass(frozen=True)
class JudgeContext:
    """What a judge knows only when it is built: `config.build(context)`."""

    reward_models: Sequence[Path] = ()  # directories of sequence classifiers
    device: str = "cpu"
    max_tokens: int = 16_384  # of one pass of a reward model
    seed: int = 0


def verify(question: Question, response: Response) -> bool:
    """Whether the last line is exactly `answer: ` and the known answer. What was cut off has no last line: wrong."""
    return response.is_complete and tasks.score({"answer": question.answer}, response.text)


def refuse_unknown_answers(judge: str, questions: Sequence[Question]) -> None:
    """A judge that goes by the answer says nothing of a question without one.

    Raises:
        UserError: nobody knows an answer to one of them.
    """
    if asked := next((question for question in questions if not question.answer), None):
        what = f"compares with the answer, and none is known to {asked.prompt[:40]!r}"
        raise UserError(f"judge {judge}", what, "Give the rows an answer, or choose another judge")


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
