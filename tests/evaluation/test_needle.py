"""Keys in haystacks: where they stand, who finds them, and what is made of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.evaluation.config import NeedleConfig
from lightning_llm.evaluation.needle import (
    OWNERS,
    chance_of,
    depths_of,
    found,
    grid_of,
    hide,
    lengths_up_to,
    needle_metrics,
)
from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import generate
from lightning_llm.models import Transformer

CONFIG = NeedleConfig(trials=3, lengths=3, depths=5, distractors=4)


@pytest.fixture(scope="module")
def tokenizer(talker):
    return Tokenizer.load(talker)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return np.array(tokenizer.encode("the quick brown fox jumps over the lazy dog. " * 40))


@pytest.fixture(scope="module")
def needles(tokenizer, haystack):
    return hide(tokenizer, haystack, CONFIG, longest=480, seed=0)


def test_lengths_are_halves_and_depths_reach_both_ends():
    assert lengths_up_to(131_072, 4) == [16_384, 32_768, 65_536, 131_072]
    assert lengths_up_to(5, 4) == [1, 2, 5]
    assert depths_of(5) == [0, 0.25, 0.5, 0.75, 1]
    assert depths_of(1) == [1]


def test_a_needle_stands_where_it_should_in_a_text_of_the_right_length(tokenizer, needles):
    assert len(needles) == 3 * 5 * 3
    assert {(needle.length, needle.depth) for needle in needles} == {
        (length, depth) for length in (120, 240, 480) for depth in (0, 0.25, 0.5, 0.75, 1)
    }
    for needle in needles:
        assert len(needle.prompt) + len(needle.answers[0]) == needle.length
        text, keys = tokenizer.decode(needle.prompt), [tokenizer.decode(answer) for answer in needle.answers]
        before, key, after = text.rpartition(f" is{keys[0]}.\n")
        assert key
        owner = next(name for name in OWNERS if text.endswith(f"The key of {name} is"))
        assert before.endswith(f"\nThe key of {owner}")
        assert len(set(keys)) == 5
        assert all(wrong not in text for wrong in keys[1:])
        stands = len(tokenizer.encode(before)) / (len(tokenizer.encode(before)) + len(tokenizer.encode(after)))
        assert stands == pytest.approx(needle.depth, abs=0.2)


def test_the_seed_decides_and_a_length_without_room_is_left_out(tokenizer, haystack, needles):
    again = hide(tokenizer, haystack, CONFIG, longest=480, seed=0)
    assert all(np.array_equal(a.prompt, b.prompt) for a, b in zip(needles, again, strict=True))
    other = hide(tokenizer, haystack, CONFIG, longest=480, seed=1)
    assert not any(np.array_equal(a.prompt, b.prompt) for a, b in zip(needles, other, strict=True))
    widest = max(len(tokenizer.encode(f"\nThe key of {owner} is 0000.\n")) for owner in OWNERS)
    short = hide(tokenizer, haystack, CONFIG, longest=8 * widest, seed=0)
    assert {needle.length for needle in short} == {4 * widest, 8 * widest}


def test_greedy_says_what_greedy_decoding_says(talker, tokenizer, needles):
    """The engine's own words, whole; a model of random weights says something, and that is made the right key."""
    model = Transformer.from_pretrained(talker).eval()
    asked = needles[:4]
    with torch.inference_mode():
        said = generate(
            model, [needle.prompt.tolist() for needle in asked], max_new_tokens=len(asked[0].answers[0]),
            stop_ids=[], sampling=Sampling(0.0), seed=0, batch_size=4,
        )  # fmt: skip
        right = [dataclasses.replace(needle, answers=[ids]) for needle, ids in zip(asked, said, strict=True)]
        assert found(model, right, "greedy", max_tokens=1000) == [True] * 4
        last = [dataclasses.replace(n, answers=[[*n.answers[0][:-1], (n.answers[0][-1] + 1) % 300]]) for n in right]
        mixed = [right[0], last[1], right[2], last[3]]
        for max_tokens in (100, 450, 10_000):  # one at a time, two, all
            assert found(model, mixed, "greedy", max_tokens) == [True, False, True, False]


def test_likelihood_is_a_choice_between_keys(talker, needles):
    model = Transformer.from_pretrained(talker).eval()
    with torch.inference_mode():
        hits = found(model, needles, "likelihood", max_tokens=2000)
        swapped = [dataclasses.replace(needle, answers=needle.answers[::-1]) for needle in needles]
        others = found(model, swapped, "likelihood", max_tokens=2000)
    assert not any(a and b for a, b in zip(hits, others, strict=True))  # one key at most is the likeliest
    assert 0 < sum(hits) < len(hits)  # a model that knows nothing is right about once in five


def test_the_grid_is_the_shares_by_hand(needles):
    hits = [needle.length == 240 and needle.depth >= 0.5 for needle in needles]
    hits[-1] = True  # one of three at 480 tokens, at the end
    grid = grid_of(needles, hits)
    assert grid == {
        "lengths": [120, 240, 480],
        "depths": [0, 0.25, 0.5, 0.75, 1],
        "found": [[0] * 5, [0, 0, 1, 1, 1], [0, 0, 0, 0, pytest.approx(1 / 3)]],
        "trials": 3,
    }
    assert needle_metrics(grid) == {"needle/120": 0, "needle/240": 0.6, "needle/480": pytest.approx(1 / 15)}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"answer": "gredy"}, "answer is greedy or likelihood"), ({"lengths": 0}, "lengths"), ({"trials": -1}, "trials")],
)
def test_wrong_settings_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        NeedleConfig(**wrong)


def test_chance_is_that_of_guessing_a_key_or_one_of_a_choice():
    assert chance_of(NeedleConfig(answer="greedy")) == 1 / 10_000
    assert chance_of(NeedleConfig(answer="likelihood", distractors=9)) == 0.1
