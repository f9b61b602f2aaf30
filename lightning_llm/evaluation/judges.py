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
    """A wrong response has lost, whatever the other one is; of two right ones that in the preferred style wins.

    So a policy gains neither by style alone nor where the other model is as wrong as it is: its win rate is at most the
    share of its right responses, and that of a model over itself one half of it. Adding half the share of questions
    that both got wrong (`judge/both_wrong`) gives the rate in which those are ties.
    """

    preferred: str = "working"

    def compare(self, question: Question, response: Response, other: Response) -> float:
        """1 if `response` wins, 0 if it is wrong or `other` wins, 0.5 for two right ones of equal style."""
        merit, other_merit = self._merit(question, response), self._merit(question, other)
        return 0.5 if merit == other_merit > 0 else float(merit > other_merit)

    def _merit(self, question: Question, response: Response) -> int:
        """0 for wrong, 1 for right, 2 for right in the preferred style."""
        return verify(question, response) * (1 + (tasks.style_of(response.text) == self.preferred))
