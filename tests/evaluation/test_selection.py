"""What is kept of several responses, balance by difficulty, and who won where: by hand and by enumeration."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.evaluation.selection import (
    Candidate,
    Group,
    choose,
    choose_pair,
    difficulty_class,
    even_counts,
    keep_share,
    who_won,
)


def candidates(*scores, model="sft", **named):
    return [Candidate(f"text {place}", model, True, score, **named) for place, score in enumerate(scores)]


def kept(found, rule="best", count=1, minimum=None, seed=0):
    return choose(found, rule, count=count, minimum=minimum, chance=random.Random(seed))


def test_the_best_is_kept():
    assert kept(candidates(0.2, 0.9, 0.5)) == [1]
    assert kept(candidates(0.2, 0.9, 0.5), count=2) == [1, 2]
    assert kept(candidates(0.2, 0.9, 0.5), minimum=0.95) == []
    assert set(kept(candidates(0.2, 0.9, 0.5), "threshold", count=9, minimum=0.5)) == {1, 2}
    assert kept(candidates(0.2, 0.9, 0.5), "first") == [0]
    assert kept(candidates(None, None), "first") == [0]


def test_what_was_cut_off_or_is_said_already_is_not_kept():
    found = [Candidate("a", "sft", False, 1.0), Candidate("b", "sft", True, 0.5), Candidate("b", "dpo", True, 0.5)]
    for rule in ("best", "threshold", "first", "random"):
        assert kept(found, rule, count=3, minimum=0.1) in ([1], [2])
    assert kept(found[:1], "first") == []
    silent = [Candidate(" ", "sft", True, 1.0), Candidate("", "sft", True, 0.0), *candidates(0.5, 0.2)]
    assert kept(silent, count=4) == [2, 3]
    assert choose_pair(silent, "best", chance=random.Random(0)) == (2, 3)


@pytest.mark.parametrize("rule", ["best", "threshold", "random"])
def test_equals_are_drawn_among(rule):
    """No place in the committee is favoured: 600 draws among three, each 200 give or take four deviations."""
    counts = Counter(kept(candidates(1.0, 1.0, 1.0), rule, minimum=0.5, seed=seed)[0] for seed in range(600))
    assert all(abs(counts[place] - 200) < 4 * (600 * 2 / 9) ** 0.5 for place in range(3))


@given(scores=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_nothing_better_is_left_behind(scores, seed):
    places = kept(candidates(*scores), count=3, seed=seed)
    assert [scores[place] for place in places] == sorted(scores, reverse=True)[:3]


def test_pairs_are_the_best_against_the_worst():
    found = candidates(0.2, 0.9, 0.1, 0.9)
    assert choose_pair(found, "best", chance=random.Random(0)) in ((1, 2), (3, 2))
    assert choose_pair(candidates(0.5, 0.5), "best", chance=random.Random(0)) is None
    cut = [Candidate("long", "sft", False, 0.9), *candidates(0.4, 0.6)]
    assert choose_pair(cut, "best", chance=random.Random(0)) == (2, 1)  # what was cut off is never chosen
    for seed in range(20):
        chosen, rejected = choose_pair(found, "random", chance=random.Random(seed)) or (0, 0)
        assert chosen != rejected
    same = [Candidate("a", "sft", True), Candidate("a", "dpo", True)]
    assert choose_pair(same, "random", chance=random.Random(0)) is None


def test_scores_are_asked_for_where_there_are_none():
    with pytest.raises(ValueError, match="no score"):
        kept(candidates(0.5, None))
    with pytest.raises(ValueError, match="rule is one of"):
        kept(candidates(0.5), "bets")


def test_classes_of_difficulty():
    assert [difficulty_class(n / 8, 4) for n in range(9)] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [difficulty_class(n / 3, 3) for n in range(4)] == [0, 1, 2, 3]


@given(there=st.dictionaries(st.integers(0, 4), st.integers(0, 6), min_size=1, max_size=3), total=st.integers(0, 20))
def test_counts_are_as_even_as_can_be(there, total):
    """Against all ways to take so many: none has a more even worst-off class, and so on upwards (leximin)."""
    taken = even_counts(there, total)
    possible = itertools.product(*(range(count + 1) for count in there.values()))
    wanted = min(total, sum(there.values()))
    fairest = max(tuple(sorted(way)) for way in possible if sum(way) == wanted)
    assert all(taken[name] <= count for name, count in there.items())
    assert tuple(sorted(taken.values())) == fairest


def test_a_share_stays():
    classes = [0] * 2 + [1] * 10 + [4] * 88
    balanced = keep_share(classes, 0.2, random.Random(0), balance=True)
    assert Counter(classes[place] for place in balanced) == {0: 2, 1: 9, 4: 9}
    assert balanced == sorted(set(balanced))
    plain = keep_share(classes, 0.2, random.Random(0), balance=False)
    assert len(set(plain)) == 20
    assert Counter(classes[place] for place in plain)[4] > 12  # as they come: 17.6 are expected
    assert keep_share(classes, 1.0, random.Random(0), balance=True) == list(range(100))


def test_who_won_where_by_hand():
    """Two models, two samples each, three prompts: sft alone solves the first, both the second, nobody the third."""

    def group(task, sft, dpo, *kept):
        scored = [("sft", score) for score in sft] + [("dpo", score) for score in dpo]
        return Group(task, tuple(Candidate(f"{n}", m, True, s) for n, (m, s) in enumerate(scored)), kept)

    groups = [group("sum", (1, 0), (0, 0), 0), group("sum", (1, 0), (1, 1), 2), group("sort", (0, 0), (0, 0))]
    table = who_won(groups, ["sft", "dpo"], right_from=0.5, bins=4)
    sft = {"samples": 6, "complete": 1.0, "score": 2 / 6, "right": 2 / 6, "best_or_tied": 1.0, "right_alone": 1 / 3}
    dpo = {"samples": 6, "complete": 1.0, "score": 2 / 6, "right": 2 / 6, "best_or_tied": 2 / 3, "right_alone": 0.0}
    assert table["models"] == {"sft": sft | {"kept": 1}, "dpo": dpo | {"kept": 1}}
    assert table["tasks"] == {
        "sort": {"prompts": 1, "right": 0.0, "kept": 0, "kept_of": {"sft": 0, "dpo": 0}},
        "sum": {"prompts": 2, "right": 0.5, "kept": 2, "kept_of": {"sft": 1, "dpo": 1}},
    }
    assert {name: entry["prompts"] for name, entry in table["difficulty"].items()} == {
        "none right": 1, "up to 1/4 right": 1, "up to 3/4 right": 1,
    }  # fmt: skip


def test_a_table_of_scores_that_only_rank():
    """Shifting all scores of a prompt changes nothing but their mean: no share of right ones is said."""

    def table(shift):
        scored = [("sft", 1.0), ("sft", -2.0), ("dpo", 1.5), ("dpo", 0.0)]
        group = Group("sum", tuple(Candidate(f"{n}", m, True, s + shift) for n, (m, s) in enumerate(scored)), (2,))
        return who_won([group], ["sft", "dpo"], right_from=None, bins=4)

    found, shifted = table(0.0), table(7.0)
    assert found["models"]["sft"] == {
        "samples": 2, "complete": 1.0, "score": -0.5, "right": None, "best_or_tied": 0.0, "right_alone": None,
        "kept": 0,
    }  # fmt: skip
    for model in ("sft", "dpo"):
        assert shifted["models"][model] == found["models"][model] | {"score": found["models"][model]["score"] + 7}
    assert found["tasks"]["sum"] == {"prompts": 1, "right": None, "kept": 1, "kept_of": {"sft": 0, "dpo": 1}}
    assert shifted["tasks"] == found["tasks"]
    assert found["difficulty"] == {}


def test_a_table_without_a_judge():
    groups = [Group("sum", (Candidate("a", "sft", True), Candidate("b", "dpo", False)), (0,))]
    table = who_won(groups, ["sft", "dpo"], right_from=0.5, bins=4)
    assert table["models"]["dpo"]["complete"] == 0.0
    assert table["models"]["sft"]["score"] is None
    assert list(table["difficulty"]) == ["not judged"]
