"""What a model is asked to go on with: texts and conversations, from the command line or a file, as token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_llm.data.tokenizer import Message, Tokenizer
from lightning_llm.generation.config import TEMPLATES
from lightning_llm.settings import UserError


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer."""

    where: str  # it comes from, for whoever has to mend it
    content: str | list[Message]


def read_prompts(texts: Sequence[str], file: str | None) -> list[Prompt]:
    """Prompts in order: those on the command line, then those of a file.

    Args:
        texts: each a prompt.
        file: *.jsonl with `prompt` (text) or `messages` (a conversation) in each row; else a prompt per line.

    Raises:
        UserError: there are none, or a row is none; names the line.
    """
    prompts = [Prompt(f"prompt {number}" if len(texts) > 1 else "prompt", text) for number, text in enumerate(texts, 1)]
    if file is not None:
        try:
            lines = Path(file).read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("prompts", f"{file} cannot be read ({error})", "Name a file of prompts in UTF-8") from error
        rows = [(f"{file}:{number}", line.strip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
        is_json = file.endswith((".jsonl", ".json"))
        prompts += [Prompt(where, read_row(where, line) if is_json else line) for where, line in rows]
    if not prompts:
        raise UserError("prompt", "is missing", 'Give prompt="...", once or several times, or prompts=FILE')
    return prompts


def read_row(where: str, line: str) -> str | list[Message]:
    """The text or the conversation of a row of JSON.

    Args:
        where: file and line, for the message.
        line: the row.

    Raises:
        UserError: it is no JSON, or neither of them, or a conversation with nothing to answer.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(where, f"is not JSON ({error})", "Write one JSON object per line") from error
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(is_message(message) for message in messages):
        found = ", ".join(row) or "nothing"
        remedy = 'Write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
        raise UserError(where, f"has neither a prompt nor messages (found: {found})", remedy)
    if messages[-1]["role"] == "assistant":
        raise UserError(where, "ends with the assistant's turn, so there is nothing to answer", "End with the user's")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def is_message(message: Any) -> bool:
    """Whether a value from JSON has a role and a content, both of them text."""
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, template: str, system: str | None) -> list[int]:
    """Token ids of a prompt, up to where the model is to go on.

    Args:
        template: `chat` renders a text as the user's turn, `raw` leaves it as it is, `auto` does so too, but renders
            conversations.
        system: what a conversation begins with, unless it has such a turn.

    Raises:
        UserError: a conversation is to be raw, or has no template; a prompt without tokens.
    """
    if template not in TEMPLATES:
        raise UserError("template", f"is {template!r}", f"Give {', '.join(TEMPLATES)}")
    content = prompt.content
    if is_conversation(prompt, template):
        if not tokenizer.has_chat_template:
            raise UserError(prompt.where, "the model has no chat template", "Give a text, and template=raw")
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        ids = tokenizer.render(messages, add_generation_prompt=True).ids
    elif isinstance(content, str):
        ids = tokenizer.encode_start(content)
    else:
        raise UserError(prompt.where, "is a conversation, and template is raw", "Give template=chat")
    if not ids:
        raise UserError(prompt.where, "is empty", "Give at least one token to go on from")
    return ids


def is_conversation(prompt: Prompt, template: str) -> bool:
    """Whether a prompt is rendered by the chat template."""
    return template == "chat" or (template == "auto" and not isinstance(prompt.content, str))
