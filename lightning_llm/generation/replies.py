"""Prompts in, texts out: the engine's tokens as they come, cut where a stop string begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_llm.generation.engine import generate
from lightning_llm.generation.speaker import Speaker
from lightning_llm.generation.stream import TextStream

Hear = Callable[[int, str, bool], None]  # prompt's number, what is new of its reply, whether that is all


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    ids: list[int]  # with the token that ended it, if there is one
    text: str  # without that, and up to the first stop string
    ended_by: str  # token | string | length


def reply_to(
    speaker: Speaker,
    prompts: Sequence[Sequence[int]],
    *,
    conversations: Sequence[bool],
    batch_size: int = 1,
    hear: Hear = lambda number, piece, is_last: None,
) -> list[Reply]:
    """A reply to each prompt, heard while it is said.

    Args:
        prompts: token ids, which `speaker.check` lets pass.
        conversations: which of them are such; their replies end with their turn, too.
        batch_size: prompts computed together.
        hear: is called with each piece of text as soon as it is certain.
    """
    stop_ids = [speaker.turn_stop_ids if is_such else speaker.stop_ids for is_such in conversations]
    streams = [TextStream(speaker.tokenizer.decode, speaker.config.stop) for _ in prompts]
    ended_by = ["length"] * len(prompts)

    def listen(number: int, token: int, is_last: bool) -> bool:
        stream, piece = streams[number], ""
        if token in stop_ids[number]:
            ended_by[number], is_last = "token", True
        else:
            piece = stream.push(token)
        if is_last:
            piece += stream.finish()
        if stream.is_stopped:
            ended_by[number], is_last = "string", True
        if piece or is_last:
            hear(number, piece, is_last)
        return is_last

    responses = generate(
        speaker.model,
        prompts,
        max_new_tokens=speaker.config.max_new_tokens,
        stop_ids=speaker.stop_ids,
        sampling=speaker.sampling,
        seed=speaker.config.seed,
        batch_size=batch_size,
        context=speaker.context,
        dual_chunk=speaker.config.dual_chunk,
        listen=listen,
    )
    return [Reply(ids, stream.text, reason) for ids, stream, reason in zip(responses, streams, ended_by, strict=True)]
