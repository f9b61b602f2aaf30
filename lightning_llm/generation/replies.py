"""Prompts in, texts out: the engine's tokens as they come, cut where a stop string begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_llm.generation.speaker import Speaker
from lightning_llm.generation.stream import TextStream


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    ids: list[int]  # with the token that ended it, if there is one
    text: str  # without that, and up to the first stop string
    ended_by: str  # token | string | length


Hear = Callable[
    [int, str, Reply | None], None
]  # prompt's number, what is new of its reply, with the last of it the whole


def reply_to(
    speaker: Speaker,
    prompts: Sequence[Sequence[int]],
    *,
    conversations: Sequence[bool],
    batch_size: int = 1,
    hear: Hear = lambda number, piece, reply: None,
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
    ids: list[list[int]] = [[] for _ in prompts]
    replies: dict[int, Reply] = {}

    def listen(number: int, token: int, is_last: bool) -> bool:
        stream, ended_by = streams[number], "length"
        ids[number].append(token)
        if token in stop_ids[number]:
            piece, ended_by, is_last = stream.finish(), "token", True
        else:
            piece = stream.push(token)
            piece += stream.finish() if is_last else ""
        if stream.is_stopped:
            ended_by, is_last = "string", True
        if is_last:
            replies[number] = Reply(ids[number], stream.text, ended_by)
        if piece or is_last:
            hear(number, piece, replies.get(number))
        return is_last

    speaker.sampler.sample(
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
    return [replies[number] for number in range(len(prompts))]
