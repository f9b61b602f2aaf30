"""Prepared rows as questions that a model is asked and a judge knows about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_llm.data.token_store import TokenStore
from lightning_llm.evaluation.judges import Question


def read_question(store: TokenStore, row: int, content: dict[str, Any]) -> Question:
    """A row of form questions or prompts.

    Args:
        content: the row's own of `store.metadata()`.
    """
    known = {name: value for name, value in content.items() if name != "prompt"}
    ids = store.row(row).segments[0].tolist()
    return Question(prompt=said(content["prompt"]), prompt_ids=ids, **known)


def said(messages: Sequence[dict[str, str]]) -> str:
    """A prompt for people to read."""
    return "\n".join(message["content"] for message in messages)
