"""The order in which prompts are asked, round by round."""

from collections import Counter

from lightning_llm.data.turns import draw_places


def test_rounds_ask_one_after_the_other():
    rows, weights = {"a": 10, "b": 100}, {"a": 1.0, "b": 1.0}
    rounds = [draw_places(rows, weights, 8, turn, 0) for turn in range(3)]
    for drawn in rounds:
        assert Counter(source for source, _ in drawn) == {"a": 4, "b": 4}
        assert len(set(drawn)) == 8
    assert not set(rounds[0]) & set(rounds[1])
    taken = [row for drawn in rounds for source, row in drawn if source == "a"]
    assert Counter(Counter(taken).values()) == {1: 8, 2: 2}  # 12 of 10: begun again behind the last
    assert {row for source, row in draw_places(rows, weights, 1000, 0, 0) if source == "a"} == set(range(10))
