"""Replies on standard output, in the order of their prompts: as text that grows, or a line of JSON for each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from lightning_llm.generation.cache import cache_bytes
from lightning_llm.generation.prompts import Prompt, encode_prompt, is_conversation
from lightning_llm.generation.replies import Reply, reply_to
from lightning_llm.generation.speaker import Speaker
from lightning_llm.settings import UserError


def write_replies(
    speaker: Speaker, prompts: Sequence[Prompt], *, template: str, batch_size: int, output_format: str
) -> None:
    """Answer all prompts.

    Args:
        template: auto | chat | raw, see prompts.encode_prompt.
        batch_size: prompts computed together.
        output_format: text | jsonl.

    Raises:
        UserError: a prompt cannot be read, before anything is said; or a setting is out of range.
    """
    if output_format not in ("text", "jsonl"):
        raise UserError("format", f"is {output_format!r}", "Give text or jsonl")
    if batch_size < 1:
        raise UserError("batch_size", f"is {batch_size}", "Give at least 1")
    ids = [encode_prompt(prompt, speaker.tokenizer, template, speaker.config.system) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        speaker.check(prompt.where, tokens)
    several = output_format == "text" and len(prompts) > 1
    writer = InOrder([f"==> {prompt.where} <==\n" if several else "" for prompt in prompts], "\n" if several else "")

    def hear(number: int, piece: str, reply: Reply | None) -> None:
        if output_format == "jsonl":
            piece = "" if reply is None else json.dumps(as_row(prompts[number], reply), ensure_ascii=False)
        writer.write(number, piece if reply is None else f"{piece}\n", is_last=reply is not None)

    start = time.perf_counter()
    conversations = [is_conversation(prompt, template) for prompt in prompts]
    replies = reply_to(speaker, ids, conversations=conversations, batch_size=batch_size, hear=hear)
    if sys.stderr.isatty():
        print(summary(speaker, ids, replies, time.perf_counter() - start), file=sys.stderr)


def summary(speaker: Speaker, prompts: Sequence[Sequence[int]], replies: Sequence[Reply], seconds: float) -> str:
    """Tokens, tokens per second, and the memory that the longest request takes beside the weights."""
    tokens = sum(len(reply.ids) for reply in replies)
    longest = max(len(ids) + len(reply.ids) for ids, reply in zip(prompts, replies, strict=True))
    weight = speaker.model.embed_tokens.weight
    mebibytes = cache_bytes(speaker.model.config, longest, weight.dtype) / 2**20
    return (
        f"{len(replies)} replies, {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} per second); "
        f"keys and values of {longest:,} tokens take {mebibytes:,.1f} MiB"
    )


def as_row(prompt: Prompt, reply: Reply) -> dict[str, Any]:
    """What a line of jsonl says of a reply; its prompt as a file of prompts spells it."""
    key = "prompt" if isinstance(prompt.content, str) else "messages"
    return {key: prompt.content, "reply": reply.text, "tokens": len(reply.ids), "ended_by": reply.ended_by}


class InOrder:
    """Prints the text whose turn it is as it grows; later ones wait, whole or in part, until theirs comes."""

    def __init__(self, headings: Sequence[str], between: str):
        """
        Args:
            headings: what stands before each text.
            between: what stands between two.
        """
        self.waiting, self.between = list(headings), between
        self.is_whole = [False] * len(headings)
        self.turn = 0

    def write(self, number: int, piece: str, is_last: bool) -> None:
        """Say a piece of text `number`, counted from 0, or keep it until the texts before are whole.

        Args:
            is_last: the text ends with this piece.
        """
        self.waiting[number] += piece
        self.is_whole[number] = is_last
        while self.turn < len(self.waiting):
            sys.stdout.write(self.waiting[self.turn])
            self.waiting[self.turn] = ""
            if not self.is_whole[self.turn]:
                break
            self.turn += 1
            sys.stdout.write(self.between if self.turn < len(self.waiting) else "")
        sys.stdout.flush()
