"""Judges that know what is right: the exact answer, the form, and unit tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import regex

from lightning_llm.evaluation.config import ExactAnswerConfig, FormatConfig, UnitTestsConfig
from lightning_llm.evaluation.judges import JudgeContext, Question, Response, Verdict, refuse_unknown_answers, verify
from lightning_llm.evaluation.sandbox import Limits, passes, refuse_weak_kernel
from lightning_llm.settings import UserError

MATCHING = 1.0  # seconds, at most, in which a response has the form or has not
CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


class ExactAnswer:
    """Right or wrong, by the last line alone (`judges.verify`)."""

    def __init__(self, config: ExactAnswerConfig, context: JudgeContext):
        pass

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """1 where it is right, else 0.

        Raises:
            UserError: nobody knows an answer.
        """
        refuse_unknown_answers("exact_answer", questions)
        return [Verdict(float(verify(q, r))) for q, r in zip(questions, responses, strict=True)]


class Format:
    """Whether a response has a form, whatever it says. What was cut off has none."""

    def __init__(self, config: FormatConfig, context: JudgeContext):
        self.pattern = regex.compile(config.pattern)

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """1 where the whole text matches, else 0; 0, too, where nobody knows within MATCHING seconds: a pattern may go
        back over a text without end, and the text is the policy's."""
        return [Verdict(float(r.is_complete and self._matches(r.text))) for r in responses]

    def _matches(self, text: str) -> bool:
        try:
            return self.pattern.fullmatch(text, timeout=MATCHING) is not None
        except TimeoutError:
            return False


class UnitTests:
    """Whether a response's code passes its question's tests.

    The code is what stands between the first three backquotes and the next, or all of the text where there are none.

    Raises:
        UserError: this machine's kernel cannot shut a process off.
    """

    def __init__(self, config: UnitTestsConfig, context: JudgeContext):
        if config.isolation == "kernel":
            refuse_weak_kernel()
        self.limits = Limits(config.seconds, config.memory_mib, config.file_mib, config.isolation == "kernel")
        self.processes = config.processes

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """1 where all tests pass, else 0.

        Raises:
            UserError: a question has no tests.
        """
        for question in questions:
            if question.tests is None:
                raise UserError(f"question {question.prompt!r}", "has no tests", "Add a field `tests` to its row")
        with ThreadPoolExecutor(self.processes) as pool:
            found = pool.map(self._passes, questions, responses)
            return [Verdict(float(passed)) for passed in found]

    def _passes(self, question: Question, response: Response) -> bool:
        return passes(code_of(response.text), question.tests or "", self.limits)


def code_of(text: str) -> str:
    """The first block of code in a text, or the text."""
    block = CODE.search(text)
    return block.group(1) if block else text
