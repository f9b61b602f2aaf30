"""Held-out questions answered by a model, and how many answers are right."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from lightning_llm.data.embedded.tasks import STYLES, style_of
from lightning_llm.data.token_store import TokenStore
from lightning_llm.evaluation.judges import Question, Response, verify
from lightning_llm.evaluation.questions import read_question
from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import generate
from lightning_llm.models import Transformer


def sample_questions(stores: Mapping[str, TokenStore], count: int) -> list[Question]:
    """At most `count` questions; tasks take turns, so that each has its share."""
    by_task: dict[str, list[Question]] = defaultdict(list)
    for store in stores.values():
        for row, content in enumerate(store.metadata()):
            by_task[content["task"]].append(read_question(store, row, content))
    turns = itertools.zip_longest(*by_task.values())
    return [question for turn in turns for question in turn if question is not None][:count]


def respond(
    model: Transformer,
    questions: Sequence[Question],
    *,
    decode: Callable[[list[int]], str],
    stop_ids: Collection[int],
    max_new_tokens: int,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Response]:
    """A model's response to each question; greedy at temperature 0.

    Args:
        decode: ids to text.
        stop_ids: tokens that end a turn.
        max_tokens: prompts and responses that are held in a cache at once.
    """
    longest = max(len(question.prompt_ids) for question in questions) + max_new_tokens
    generated = generate(
        model,
        [question.prompt_ids for question in questions],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=Sampling(temperature),
        seed=seed,
        batch_size=max(max_tokens // longest, 1),
    )
    responses = []
    for ids in generated:
        is_complete = bool(ids) and ids[-1] in stop_ids
        responses.append(Response(ids, decode(ids[:-1] if is_complete else ids), is_complete))
    return responses


def task_metrics(questions: Sequence[Question], responses: Sequence[Response]) -> dict[str, float]:
    """Exact match of each task and of all questions; shares of the responses that ended, and that are in each style."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, response in zip(questions, responses, strict=True):
        right[question.task].append(verify(question, response))
    everyone = [hit for hits in right.values() for hit in hits]
    metrics = {"tasks/exact_match": _share(everyone)}
    metrics |= {f"tasks/{task}": _share(hits) for task, hits in sorted(right.items())}
    metrics["responses/complete"] = _share([response.is_complete for response in responses])
    for style in STYLES:
        metrics[f"responses/{style}"] = _share([style_of(response.text) == style for response in responses])
    return metrics


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
