"""Who is right and who wins."""

import itertools

import pytest

from lightning_llm.evaluation.judges import Question, Response, StyleAndCorrectness, verify

QUESTION = Question("sort", "sort 312", [1, 2], "123")


def response(text: str, is_complete: bool = True) -> Response:
    return Response([], text, is_complete)


RIGHT_BARE = response("answer: 123")
RIGHT_WORKING = response("working: 3 13 123\nanswer: 123")
WRONG_BARE = response("answer: 132")
WRONG_WORKING = response("working: 3 13 132\nanswer: 132")
CUT_OFF = response("answer: 123", is_complete=False)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("answer: 123", True),
        ("working: 1 2 3\nanswer: 123", True),
        ("anything at all\nanswer: 123", True),
        ("answer: 123\nanswer: 132", False),
        ("answer: 1234", False),
        ("answer: 123.", False),
        ("the answer: 123", False),
        ("Answer: 123", False),
        ("123", False),
        ("", False),
    ],
)
def test_only_the_last_line_counts_and_strictly(text, right):
    assert verify(QUESTION, response(text)) is right


def test_what_was_cut_off_is_wrong():
    assert not verify(QUESTION, CUT_OFF)  # `answer: 123` may have been the beginning of `answer: 1234`


@pytest.mark.parametrize(
    ("one", "other", "score"),
    [
        (RIGHT_WORKING, RIGHT_BARE, 1.0),
        (RIGHT_WORKING, RIGHT_WORKING, 0.5),
        (RIGHT_BARE, RIGHT_BARE, 0.5),
        (RIGHT_BARE, WRONG_WORKING, 1.0),
        (RIGHT_BARE, CUT_OFF, 1.0),
        (RIGHT_WORKING, WRONG_WORKING, 1.0),
        (WRONG_WORKING, RIGHT_BARE, 0.0),
        (WRONG_WORKING, WRONG_BARE, None),
        (WRONG_BARE, CUT_OFF, None),
    ],
)
def test_correctness_first_then_style(one, other, score):
    assert StyleAndCorrectness().compare(QUESTION, one, other) == score


def test_judging_is_fair_and_a_wrong_response_has_lost():
    judge = StyleAndCorrectness()
    everyone = (RIGHT_BARE, RIGHT_WORKING, WRONG_BARE, WRONG_WORKING, CUT_OFF)
    for one, other in itertools.product(everyone, repeat=2):
        score = judge.compare(QUESTION, one, other)
        reverse = judge.compare(QUESTION, other, one)
        if score is None:
            assert reverse is None
            assert not verify(QUESTION, one)
            assert not verify(QUESTION, other)
        else:
            assert score + reverse == 1
            assert verify(QUESTION, one) or score == 0


def test_the_preferred_style_is_the_judges():
    assert StyleAndCorrectness(preferred="bare").compare(QUESTION, RIGHT_BARE, RIGHT_WORKING) == 1.0
