"""A needle in a haystack: is a key found again at the end of a long text, wherever in it that stands?

The text is held out, the key is drawn for this one question, and the last line asks for it by its owner:

    ... held-out text ...
    The key of Lima is 4817.
    ... held-out text ...
    The key of Lima is

Llama 3 goes on to the next length of context once such keys are found at all lengths up to this one (arXiv 2407.21783,
section 3.4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.evaluation.config import NeedleConfig
from lightning_llm.evaluation.preference import response_logps
from lightning_llm.models import Transformer

OWNERS = (
    "Accra", "Bergen", "Cusco", "Dakar", "Espoo", "Fez", "Graz", "Hanoi", "Izmir", "Jaipur", "Kyoto", "Lima", "Malmo",
    "Nantes", "Oslo", "Porto", "Quito", "Riga", "Sofia", "Turin",
)  # fmt: skip
DIGITS = 4  # of a key: one in 10,000 is guessed
HIDDEN, QUESTION, ANSWER = "\nThe key of {} is {:04d}.\n", "\nThe key of {} is", " {:04d}"
LEAST_TEXT = 2  # a length is left out if less than so many needles' worth of it would be text


@dataclass(frozen=True)
class Needle:
    """One question: a text with a key in it, and what may be said to its last line."""

    length: int  # tokens of text, question and key
    depth: float  # share of the text that stands before the key
    prompt: np.ndarray  # ids
    answers: list[list[int]]  # ids of keys, all different; the first is the right one


def lengths_up_to(longest: int, count: int) -> list[int]:
    """At most `count` lengths in tokens, each twice the one before, up to the longest."""
    return [longest >> halvings for halvings in reversed(range(count)) if longest >> halvings]


def depths_of(count: int) -> list[float]:
    """`count` depths from 0, the text's beginning, to 1, its end; the end alone of one."""
    return [1.0] if count == 1 else [place / (count - 1) for place in range(count)]


def hide(tokenizer: Tokenizer, haystack: np.ndarray, config: NeedleConfig, longest: int, seed: int) -> list[Needle]:
    """All questions of a grid: `trials` at each length and depth, each with its own key, owner and piece of text.

    Args:
        haystack: ids of text; it is gone through in a circle where it is shorter than a question.
        longest: length in tokens, of prompt and key.
        seed: of keys, owners and where a piece begins.
    """
    chance = np.random.default_rng(seed)
    widest = max(len(tokenizer.encode(HIDDEN.format(owner, 0))) for owner in OWNERS)
    needles = []
    for length in lengths_up_to(longest, config.lengths):
        if length < (LEAST_TEXT + 2) * widest:  # the key, the question, and some text
            continue
        for depth in depths_of(config.depths):
            for _ in range(config.trials):
                owner = OWNERS[chance.integers(len(OWNERS))]
                keys = chance.choice(10**DIGITS, config.distractors + 1, replace=False)
                begin = int(chance.integers(len(haystack)))
                answers = [tokenizer.encode(ANSWER.format(key)) for key in keys]
                hidden = tokenizer.encode(HIDDEN.format(owner, keys[0]))
                question = tokenizer.encode(QUESTION.format(owner))
                room = length - len(hidden) - len(question) - max(map(len, answers))
                text = haystack.take(range(begin, begin + room), mode="wrap")
                cut = round(depth * room)
                prompt = np.concatenate([text[:cut], hidden, text[cut:], question])
                needles.append(Needle(length, depth, prompt, answers))
    return needles


def found(model: Transformer, needles: Sequence[Needle], answer: str, max_tokens: int) -> list[bool]:
    """Of each question whether the right key is said.

    Args:
        answer: greedy (each of its tokens is the likeliest after those before it, as greedy decoding would have it), or
            likelihood (as a whole it is likelier than all wrong keys: for models that are too small to spell it).
        max_tokens: of one forward pass.
    """
    if answer == "greedy":
        return spelt(model, needles, max_tokens)
    logps = response_logps(
        model, [needle.prompt for needle in needles], [needle.answers for needle in needles], max_tokens
    )
    return (logps[:, 0] > logps[:, 1:].amax(1)).tolist()


def spelt(model: Transformer, needles: Sequence[Needle], max_tokens: int) -> list[bool]:
    """Of each question whether greedy decoding says the right key."""
    device, hits = model.head_weight.device, []
    each = max(max_tokens // max(len(needle.prompt) + DIGITS + 1 for needle in needles), 1)
    for at in range(0, len(needles), each):
        some = needles[at : at + each]
        batch = SegmentBatch.from_groups([n.prompt for n in some], [n.answers[:1] for n in some]).to(device)
        counted = batch.target_mask.nonzero().squeeze(1)
        logits: Tensor = model.logits(model(batch)[batch.predictors[counted]])  # [targets, V]
        right = torch.zeros_like(batch.target_ids, dtype=torch.float32)
        right[counted] = (logits.argmax(1) == batch.target_ids[counted]).float()
        said = batch.sum_by_segment(right)[batch.prefix >= 0].tolist()
        hits += [count == len(needle.answers[0]) for count, needle in zip(said, some, strict=True)]
    return hits


def chance_of(config: NeedleConfig) -> float:
    """The share of needles that is found by guessing."""
    return 10.0**-DIGITS if config.answer == "greedy" else 1 / (1 + config.distractors)


def grid_of(needles: Sequence[Needle], hits: Sequence[bool]) -> dict[str, Any]:
    """What needle.json holds: shares found, by length and depth.

    Returns:
        `lengths`, `depths`, and `found`: for each length a list over the depths.
    """
    cells: dict[tuple[int, float], list[bool]] = {}
    for needle, hit in zip(needles, hits, strict=True):
        cells.setdefault((needle.length, needle.depth), []).append(hit)
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    shares = [[sum(cells[length, depth]) / len(cells[length, depth]) for depth in depths] for length in lengths]
    return {"lengths": lengths, "depths": depths, "found": shares, "trials": len(hits) // max(len(cells), 1)}


def needle_metrics(grid: dict[str, Any]) -> dict[str, float]:
    """needle/<length>: the share that is found at a length, over all depths."""
    lengths: list[int] = grid["lengths"]
    return {
        f"needle/{length}": sum(shares) / len(shares) for length, shares in zip(lengths, grid["found"], strict=True)
    }
