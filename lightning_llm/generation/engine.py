"""Continue prompts, many at a time: whoever ends makes place for the next, and a prompt with several samples is
computed once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_llm.generation.cache import Cache, decode, prefill
from lightning_llm.generation.config import DualChunkConfig, Sampling
from lightning_llm.generation.dual_chunk import DualChunk
from lightning_llm.generation.packed import Packed
from lightning_llm.generation.recorded_step import RecordedStep, can_be_recorded
from lightning_llm.generation.sampling import next_tokens, request_uniforms
from lightning_llm.generation.stream import TextStream
from lightning_llm.models.rope import inverse_frequencies
from lightning_llm.models.transformer import Transformer
from lightning_llm.settings import UserError

GREEDY = Sampling()
REFILL = 16  # new prompts are computed when a sixteenth of the places is free: one at a time costs more
Listener = Callable[
    [int, int, bool], bool
]  # response, its new token, whether that is its last -> whether to end it here


@dataclass
class Sample:
    """A response to a prompt."""

    ids: list[int] = field(default_factory=list)  # the stop token included, if there is one
    logps: list[float] = field(default_factory=list)  # of each token in what it was drawn from, in nats; greedy: 0
    is_stopped: bool = False  # by a stop string


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int],
    **options: Any,
) -> list[list[int]]:
    """The ids of a response to each prompt; options, and errors, are those of `sample`."""
    found = sample(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, **options)
    return [response.ids for response in found]


def sample(model: Transformer, prompts: Sequence[Sequence[int]], **options: Any) -> list[Sample]:
    """`Sampler.sample` with the weights as they are now."""
    return Sampler(model).sample(prompts, **options)


class Sampler:
    """Samples from a model again and again, also while it is trained: `refresh` takes over the weights of now."""

    def __init__(self, model: Transformer):
        self.model, self.packed = model, Packed(model)

    def refresh(self) -> None:
        """Sample from the model's present weights from now on. In place: nothing is loaded or built again."""
        self.packed.refresh()

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        stop_ids: Collection[int],
        samples: int = 1,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        batch_size: int = 64,
        context: int | None = None,
        dual_chunk: DualChunkConfig | None = None,
        listen: Listener | None = None,
        stops: Sequence[str] = (),
        decode_ids: Callable[[list[int]], str] | None = None,
    ) -> list[Sample]:
        """So many responses to each prompt: all of the first prompt's, then the second's, and so on.

        They run in `batch_size` places. One that ends leaves its place at once, and when enough are free the next come
        in (continuous batching; Yu et al. 2022, Orca): those that may take longest, and of these the shortest prompts.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: a response is cut after so many; one number, or one for each response.
            stop_ids: tokens that end a response.
            samples: of each prompt, which is computed once for as many of them as there are places.
            sampling: how tokens are drawn.
            seed: of sampling. A response depends on the seed and its own number, not on what runs beside it.
            numbers: of each response; None: as they stand. Who samples a share of them gives them their own.
            batch_size: responses that run at once, at most.
            context: prompt and response have so many tokens at most; None: any number.
            dual_chunk: dual chunk attention in the place of the model's own.
            listen: hears every token as soon as it is known.
            stops: strings that end a response, with the token that completes one; needs `decode_ids`.
            decode_ids: ids to text.

        Raises:
            ValueError: an empty prompt, one that leaves no room in the context, or a number out of range.
            UserError: dual chunk attention of a model with sliding windows.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, is {batch_size}")
        if stops and decode_ids is None:
            raise ValueError("stop strings need at least decode_ids, to be found in a text")
        limits = response_limits(prompts, samples, max_new_tokens, context)
        streams = [TextStream(decode_ids, stops) for _ in limits] if stops and decode_ids is not None else None
        model = self.packed.body
        chunks = build_dual_chunk(model, dual_chunk)
        if not limits:
            return []
        responses = [Sample() for _ in limits]
        of_seed = zip(range(len(limits)) if numbers is None else numbers, limits, strict=True)
        draws = pad_sequence([request_uniforms(number, limit, seed) for number, limit in of_seed], True)
        positions = max((len(prompts[number // samples]) + limit - 1 for number, limit in enumerate(limits)))
        cache = Cache(model, min(batch_size, len(limits)), positions, chunks)
        recorded = RecordedStep(model, cache) if can_be_recorded(model, cache, max(limits)) else None
        waiting = deque(in_groups(prompts, limits, samples, cache.rows))
        running: list[int] = []  # the responses in the cache's rows
        tokens: list[int] = []  # the newest of each
        said = said_already(model, []) if sampling.repetition_penalty != 1 else None

        def is_over(number: int, token: int, logp: float) -> bool:
            response = responses[number]
            response.ids.append(token)
            response.logps.append(logp)
            is_last = token in stop_ids or len(response.ids) == limits[number]
            if streams is not None and token not in stop_ids:
                streams[number].push(token)
                response.is_stopped = streams[number].is_stopped
                is_last = is_last or response.is_stopped
            return (listen is not None and listen(number, token, is_last)) or is_last

        while waiting or running:
            hidden = []
            if running:
                newest = torch.tensor(tokens)
                hidden.append(decode(model, cache, newest) if recorded is None else recorded.decode(newest))
            if groups := next_groups(waiting, cache.rows - len(running), cache.rows):
                firsts = [prompts[group[0] // samples] for group in groups]
                copies = torch.tensor([len(group) for group in groups])
                of_prompts = prefill(model, cache, firsts, copies.tolist())
                hidden.append(of_prompts.repeat_interleave(copies.to(cache.device), dim=0))
                running += [number for group in groups for number in group]
                if said is not None:
                    new = said_already(model, firsts).repeat_interleave(copies.to(cache.device), dim=0)
                    said = torch.cat((said, new))
            now = torch.tensor(running), torch.tensor([len(responses[number].ids) for number in running])
            chosen, logps = next_tokens(
                self.packed.logits(torch.cat(hidden)), draws[now].to(cache.device), sampling, said
            )
            if said is not None:
                said.scatter_(1, chosen[:, None], True)
            tokens = chosen.tolist()
            over = [
                row for row, heard in enumerate(zip(running, tokens, logps.tolist(), strict=True)) if is_over(*heard)
            ]
            for row in reversed(over):  # the last takes the place of each
                cache.remove(row)
                for kept in (running, tokens):
                    kept[row] = kept[-1]
                    kept.pop()
                if said is not None:
                    said[row] = said[-1]
                    said = said[:-1]
        return responses


def response_limits(
    prompts: Sequence[Sequence[int]], samples: int, max_new_tokens: int | Sequence[int], context: int | None
) -> list[int]:
    """Tokens of each response, at most.

    Raises:
        ValueError: as `sample`.
    """
    count = len(prompts) * samples
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if samples < 1 or len(limits) != count:
        raise ValueError(f"{len(limits)} lengths for {count} responses; samples is at least 1, is {samples}")
    if min(limits, default=1) < 1 or (isinstance(max_new_tokens, int) and max_new_tokens < 1):
        raise ValueError("max_new_tokens is at least 1")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has at least one token")
    room = [int(min(limit, (context or math.inf) - len(prompts[n // samples]))) for n, limit in enumerate(limits)]
    if min(room, default=1) < 1:
        raise ValueError(f"the context of {context} tokens has at least one token more than a prompt")
    return room


def in_groups(prompts: Sequence[Sequence[int]], limits: Sequence[int], samples: int, places: int) -> list[list[int]]:
    """Responses that come in together because they share a prompt, at most as many as there are places.

    First those that may take longest, so that the last steps are not those of a few; among equals shortest prompts.
    """
    groups = []
    for prompt in range(len(prompts)):
        numbers = range(prompt * samples, (prompt + 1) * samples)
        groups += [list(numbers[first : first + places]) for first in range(0, samples, places)]
    return sorted(
        groups, key=lambda group: (-max(limits[number] for number in group), len(prompts[group[0] // samples]))
    )


def next_groups(waiting: deque[list[int]], free: int, places: int) -> list[list[int]]:
    """Take those who come in now: none while few places are free, then all that find room."""
    groups = []
    if free * REFILL >= places:
        while waiting and len(waiting[0]) <= free:
            groups.append(waiting.popleft())
            free -= len(groups[-1])
    return groups


def said_already(model: Transformer, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Which tokens each prompt has, bool [B, V]."""
    said = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        said[row, list(prompt)] = True
    return said.to(model.embed_tokens.weight.device)


def build_dual_chunk(model: Transformer, config: DualChunkConfig | None) -> DualChunk | None:
    """Dual chunk attention for a model; None if it is not asked for.

    Raises:
        UserError: the model has layers with a sliding window.
    """
    if config is None or config.chunk_size is None:
        return None
    if any(model.config.layer_attention(layer).window for layer in range(model.config.num_hidden_layers)):
        raise UserError(
            "dual_chunk", f"{model.config.name} has layers with a sliding window", "Use a model that sees all of a text"
        )
    device = model.embed_tokens.weight.device
    return DualChunk(config, inverse_frequencies(model.config.rope_parameters, model.config.head_size, device))
