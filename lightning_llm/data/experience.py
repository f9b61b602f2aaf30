"""A record of what a policy said to prompts and what it was worth: saved, read again, and made into batches.

It holds all that an update needs, so that the same update can be made from it again. On disk it is a folder:

record.json          counters
responses.jsonl      a line for each prompt: what is known of it, what was said, rewards (for people to read, too)
tokens.safetensors   ids and log-probabilities of all tokens, one after the other
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.pairs import best_against_worst

TOKEN_LOGPS = ("sampler_logps", "sampled_logps", "reference_logps")  # of each token of a response, in nats
COLUMNS = ("sampled_logps", "reference_logps")  # those that batches have


@dataclass(frozen=True, eq=False)
class Drawn:
    """A response that the policy has drawn, n tokens long, and what it was worth."""

    ids: list[int]  # with the token that ended the turn, if there is one
    text: str  # without it
    is_complete: bool
    reward: float
    parts: dict[str, float]  # what the reward is made of, by name
    sampler_logps: np.ndarray  # float32 [n], as the sampler had it, in what the tokens were drawn from
    sampled_logps: np.ndarray  # float32 [n], under the same policy, by the pass that trains it
    reference_logps: np.ndarray  # float32 [n], under the reference


@dataclass(frozen=True, eq=False)
class Group:
    """A prompt with the responses to it, which stay together."""

    question: dict[str, Any]  # what is known of it: task, prompt, answer, ...
    prompt_ids: list[int]
    responses: list[Drawn]

    @property
    def length(self) -> int:
        """Tokens, the prompt counted once."""
        return len(self.prompt_ids) + sum(len(response.ids) for response in self.responses)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(tokens, tokens of its prefix) of prompt and responses: what attention costs."""
        prompt = len(self.prompt_ids)
        return [(prompt, 0), *((len(response.ids), prompt) for response in self.responses)]

    def pair(self) -> Group | None:
        """The best response that is complete and the worst, in this order; None where it is not better.

        Of equals the first is taken: they were drawn independently, so their order says nothing.
        """
        rewards = [response.reward for response in self.responses]
        complete = [place for place, response in enumerate(self.responses) if response.is_complete]
        places = best_against_worst(rewards, complete, range(len(rewards)))
        return places and Group(self.question, self.prompt_ids, [self.responses[place] for place in places])

    @property
    def is_tied(self) -> bool:
        """Whether all responses are worth the same."""
        return len({response.reward for response in self.responses}) == 1


@dataclass(frozen=True, eq=False)
class Experience:
    """What was drawn at once, from one state of the policy."""

    number: int  # of the record, from 0
    step: int  # optimizer steps before it: the version of the policy
    samples: int  # responses drawn before it, also by the same stage in the rounds before
    groups: list[Group] = field(repr=False)

    def save(self, folder: Path) -> None:
        """Write the record; the folder is there when it is complete, also where the machine stops at any moment."""
        half = folder.with_name(f"{folder.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        counters = {"number": self.number, "step": self.step, "samples": self.samples, "prompts": len(self.groups)}
        (half / "record.json").write_text(json.dumps(counters) + "\n", "utf-8")
        with (half / "responses.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(_readable(group), ensure_ascii=False) + "\n" for group in self.groups)
        save_file(_token_arrays(self.groups), half / "tokens.safetensors")
        for path in (*half.iterdir(), half):
            _sync(path)
        half.rename(folder)

    @classmethod
    def load(cls, folder: Path) -> Experience:
        """What `save` has written, to the bit."""
        counters = json.loads((folder / "record.json").read_text("utf-8"))
        with (folder / "responses.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        groups = list(_groups(rows, load_file(folder / "tokens.safetensors")))
        return cls(counters["number"], counters["step"], counters["samples"], groups)


def build_batch(groups: Sequence[Group]) -> SegmentBatch:
    """Prompts with their responses; without any, a batch in which nothing counts.

    Columns: `sampled_logps` and `reference_logps` [N], `rewards` [S] (0 for prompts).
    """
    segments: list[Any] = []
    prefix: list[int] = []
    masks: list[Any] = []
    rewards: list[float] = []
    values: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for group in groups:
        prefix += [-1] + [len(segments)] * len(group.responses)
        segments += [group.prompt_ids, *(response.ids for response in group.responses)]
        masks += [np.zeros(len(group.prompt_ids), bool)] + [None] * len(group.responses)
        rewards += [0.0, *(response.reward for response in group.responses)]
        for name, column in values.items():
            column += [None, *(getattr(response, name) for response in group.responses)]
    if not segments:
        segments, prefix, masks, rewards = [np.zeros(2, np.int64)], [-1], [np.zeros(2, bool)], [0.0]
        values = {name: [None] for name in values}
    batch = SegmentBatch.from_segments(segments, prefix, masks, values)
    batch.columns["rewards"] = torch.tensor(rewards)
    return batch


# ---- files ----


def _readable(group: Group) -> dict[str, Any]:
    responses = [
        {"text": each.text, "is_complete": each.is_complete, "reward": each.reward, "parts": each.parts}
        for each in group.responses
    ]
    return {**group.question, "responses": responses}


def _token_arrays(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Lengths of prompts and responses, their ids, and what is known of each of the responses' tokens."""
    responses = [response for group in groups for response in group.responses]
    prompts = [group.prompt_ids for group in groups]
    arrays = {
        "prompt_lengths": np.array([len(ids) for ids in prompts], np.int64),
        "prompt_ids": np.array([token for ids in prompts for token in ids], np.int32),
        "response_lengths": np.array([len(response.ids) for response in responses], np.int64),
        "response_ids": np.array([token for response in responses for token in response.ids], np.int32),
    }
    for name in TOKEN_LOGPS:
        values = [getattr(response, name) for response in responses]
        arrays[name] = np.concatenate([np.zeros(0, np.float32), *values], dtype=np.float32)
    return arrays


def _groups(rows: Sequence[dict[str, Any]], arrays: dict[str, np.ndarray]) -> Iterator[Group]:
    """The inverse of `_readable` and `_token_arrays`."""
    prompts = _cut(arrays["prompt_ids"], arrays["prompt_lengths"])
    ids = _cut(arrays["response_ids"], arrays["response_lengths"])
    logps = [_cut(arrays[name], arrays["response_lengths"]) for name in TOKEN_LOGPS]
    tokens = zip(ids, *logps, strict=True)
    for row, prompt in zip(rows, prompts, strict=True):
        responses = []
        for content in row["responses"]:
            own, *of_tokens = next(tokens)
            responses.append(Drawn(own.tolist(), **content, **dict(zip(TOKEN_LOGPS, of_tokens, strict=True))))
        question = {name: value for name, value in row.items() if name != "responses"}
        yield Group(question, prompt.tolist(), responses)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, lengths.cumsum()[:-1])
