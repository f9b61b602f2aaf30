"""Which responses are right, and which of two is better: verifiers and judges, used wherever responses are compared."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_llm.data.embedded import tasks


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is known."""

    task: str
    prompt: str  # what the user says, for people to read
    prompt_ids: list[int]  # the rendered conversation, up to where the assistant is to speak
    answer: str


@dataclass(frozen=True)
class Response:
    """What a model said to a question."""

    ids: list[int]  # with the token that ended the turn, if there is one
    text: str  # without it
    is_complete: bool  # the model ended its turn; otherwise it was cut off


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
