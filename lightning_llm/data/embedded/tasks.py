"""Four tasks whose answers can be verified, small enough for a model of a million parameters to learn in minutes.

The answer is always the last line, `answer: ...`, and only that line is scored. Conversations come in two styles, half
and half: `bare` is that line alone, `working` puts a line before it that really helps (digits read backwards, a sorted
run that grows, the largest so far, a sum digit by digit). In preferences both answers are right and `working` is
chosen. A question is held out by its own hash, so it is never trained on in any of the sources.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

TASKS = ("reverse", "sort", "largest", "sum")
STYLES = ("bare", "working")
SPLITS = ("train", "validation")
HELD_OUT = 0.1  # share of all questions
ANSWER, WORKING = "answer: ", "working: "

Question = dict[str, Any]  # task, question, answer, working


def _make(task: str, rng: random.Random) -> Question:
    """One question of a task, its answer, and a line of working that leads there."""
    if task in ("reverse", "sort"):
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 4)))
        question = f"{task} {digits}"
        if task == "reverse":
            answer, steps = digits[::-1], list(digits[::-1])
        else:
            answer, steps = "".join(sorted(digits)), ["".join(sorted(digits[: i + 1])) for i in range(len(digits))]
    elif task == "largest":
        numbers = [rng.randint(10, 99) for _ in range(3)]
        question = f"largest {' '.join(map(str, numbers))}"
        answer, steps = str(max(numbers)), [str(max(numbers[: i + 1])) for i in range(3)]
    elif task == "sum":
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        question, answer = f"sum {a} {b}", str(a + b)
        units = a % 10 + b % 10
        steps = [f"{a % 10}+{b % 10}={units}", f"{a // 10}+{b // 10}+{units // 10}={(a + b) // 10}"]
    else:
        raise ValueError(f"task is one of {', '.join(TASKS)}, got {task!r}")
    return {"task": task, "question": question, "answer": answer, "working": " ".join(steps)}


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out share of all questions, whoever asks it."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT * 2**64


def _stream(split: str, task: str, seed: int, purpose: str) -> Iterator[Question]:
    """Endless questions of a split; they may repeat."""
    rng = random.Random(f"{seed} {purpose} {split} {task}")
    while True:
        question = _make(task, rng)
        if is_held_out(question["question"]) == (split == "validation"):
            yield question


def _every_question(task: str) -> Iterator[str]:
    """All that `_make` can ask, each question once."""
    if task in ("reverse", "sort"):
        return (f"{task} {''.join(digits)}" for n in (3, 4) for digits in itertools.product("0123456789", repeat=n))
    numbers = itertools.product(range(10, 100), repeat=3 if task == "largest" else 2)
    return (f"{task} {' '.join(map(str, several))}" for several in numbers)


def different_questions(split: str, task: str, enough: int) -> int:
    """How many different questions of a task a split has, counted up to `enough` (about 800 sums are held out)."""
    of_split = (question for question in _every_question(task) if is_held_out(question) == (split == "validation"))
    return sum(1 for _ in itertools.islice(of_split, enough))


def questions(split: str, task: str, n: int, seed: int = 0) -> list[Question]:
    """`n` different questions of a task.

    Args:
        split: "train" or "validation" (held out).

    Raises:
        ValueError: the split has fewer questions than that.
    """
    if (count := different_questions(split, task, n)) < n:
        raise ValueError(f"{split} has {count} different questions of {task}, not {n}")
    found: dict[str, Question] = {}
    stream = _stream(split, task, seed, "questions")
    while len(found) < n:
        question = next(stream)
        found.setdefault(question["question"], question)
    return list(found.values())


def response(question: Question, style: str) -> str:
    """The right answer in a style."""
    last = ANSWER + question["answer"]
    return last if style == "bare" else f"{WORKING}{question['working']}\n{last}"


def score(question: Question, response: str) -> bool:
    """Whether the last line is exactly `answer: ` and the right answer; nothing before it counts."""
    return response.strip().rsplit("\n", 1)[-1] == ANSWER + question["answer"]


def style_of(response: str) -> str:
    """`working` if a line of working stands before the last line, otherwise `bare`."""
    lines = response.strip().split("\n")
    has_working = any(line.startswith(WORKING) and line.removeprefix(WORKING).strip() for line in lines[:-1])
    return "working" if has_working else "bare"


def instructions(split: str, rows: int, seed: int = 0, multi_turn: float = 0.15) -> Iterator[list[dict[str, str]]]:
    """Conversations, the tasks in equal shares and each of them in both styles alike.

    Args:
        multi_turn: share of conversations with a second question.
    """
    rng = random.Random(f"{seed} instructions {split}")
    streams = [_stream(split, task, seed, "instructions") for task in TASKS]
    turns = ((task, style) for _ in iter(int, 1) for style in STYLES for task in range(len(TASKS)))  # endless
    for _ in range(rows):
        messages = []
        for _ in range(2 if rng.random() < multi_turn else 1):
            task, style = next(turns)
            question = next(streams[task])
            messages.append({"role": "user", "content": question["question"]})
            messages.append({"role": "assistant", "content": response(question, style)})
        yield messages


def preferences(split: str, rows: int, seed: int = 0) -> Iterator[Question]:
    """Questions with two right responses: `chosen` with working, `rejected` bare; tasks in equal shares."""
    streams = [_stream(split, task, seed, "preferences") for task in TASKS]
    for row in range(rows):
        question = next(streams[row % len(TASKS)])
        yield {**question, "chosen": response(question, "working"), "rejected": response(question, "bare")}


def comparisons(split: str, rows: int, seed: int = 0) -> Iterator[Question]:
    """Questions with responses that differ in correctness or in style, for reward models; tasks in equal shares.

    Of three rows two have a right response above a wrong one, whatever the style of either (`strength` 4, and in the
    second of them 3 with an `edited` response above both: right, with working); in the third both are right and that
    with working is slightly better (`strength` 2). Wrong answers are near misses.
    """
    rng = random.Random(f"{seed} comparisons {split}")
    streams = [_stream(split, task, seed, "comparisons") for task in TASKS]
    for row in range(rows):
        question = next(streams[row % len(TASKS)])
        wrong = response({**question, "answer": near_miss(question, rng)}, rng.choice(STYLES))
        bare, working = (response(question, style) for style in STYLES)
        kind = row // len(TASKS) % 3
        if kind == 0:
            yield {**question, "chosen": rng.choice((bare, working)), "rejected": wrong, "strength": 4}
        elif kind == 1:
            yield {**question, "chosen": bare, "rejected": wrong, "edited": working, "strength": 3}
        else:
            yield {**question, "chosen": working, "rejected": bare, "strength": 2}


def with_grades(comparison: Question) -> Question:
    """The same with what a person would say of each response alone: its truthfulness, 0 of a wrong answer, 2 of a right
    one (AFM's report has three grades of each thing)."""
    responses = (name for name in ("chosen", "rejected", "edited") if name in comparison)
    grades = {name: {"truthfulness": 2 * score(comparison, comparison[name])} for name in responses}
    return {**comparison, "grades": grades}


def near_miss(question: Question, rng: random.Random) -> str:
    """A wrong answer that looks right: another of the numbers, a digit changed, or two neighbours exchanged."""
    answer = question["answer"]
    if question["task"] == "largest" and (others := set(question["question"].split()[1:]) - {answer}):
        return rng.choice(sorted(others))
    while True:
        place = rng.randrange(len(answer))
        digits = list(answer)
        if rng.random() < 0.5 and place:
            digits[place - 1 : place + 1] = digits[place], digits[place - 1]
        else:
            digits[place] = rng.choice("0123456789")
        if (wrong := "".join(digits)) != answer:
            return wrong
