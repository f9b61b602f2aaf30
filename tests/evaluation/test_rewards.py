"""Figures of a reward model against counting by hand, and scores of rankings against one document at a time."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import GRADED
from lightning_llm.data.packing import Feed, iterate_batches
from lightning_llm.data.token_store import TokenStore, TokenStoreWriter
from lightning_llm.evaluation.rewards import (
    Rankings,
    by_strength,
    calibration_error,
    calibration_table,
    length_correlation,
    reward_metrics,
    score_rankings,
)
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.reward import RewardModel

NAN = math.nan
ROWS = [  # prompt, responses (chosen, rejected, edited), what is known of them
    ([1, 2, 3], [[4, 9], [5, 5, 9], []], {"strength": 4, "grades": {"chosen": {"verbosity": 2}}}),
    ([7], [[6, 9], [7, 9], [8, 4, 9]], {"strength": 1, "grades": {"edited": {"verbosity": 0}, "rejected": {}}}),
    ([1, 1], [[5, 9], [8, 9], []], {}),
    ([3], [[5, 5, 5, 9], [8, 9], []], {"strength": 4}),
]


@pytest.fixture(scope="module")
def model():
    sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    backbone = Transformer(ModelConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3))
    backbone.reset_parameters(1)
    return RewardModel.from_backbone(backbone, seed=3, graded=["verbosity"]).eval()


@pytest.fixture(scope="module")
def feed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rankings")
    writer = TokenStoreWriter(folder, "rankings", 20)
    for prompt, responses, known in ROWS:
        writer.append([prompt, *responses], [[False] * len(prompt), *([True] * len(ids) for ids in responses)], known)
    writer.close()
    return Feed("rankings", TokenStore.open(folder), 64, "stop", {})


@pytest.mark.parametrize("max_tokens", [1, 18, 1000])
@torch.inference_mode()
def test_scores_are_those_of_each_response_alone(max_tokens, model, feed):
    found = score_rankings(model, (batch for batch, _ in iterate_batches(feed, 64, max_tokens)))
    assert found.strength.tolist() == [4, 1, 0, 4]
    assert found.edited.tolist() == [False, True, False, False]
    assert found.lengths.tolist() == [[len(ids) for ids in responses] for _, responses, _ in ROWS]
    for row, (prompt, responses, _) in enumerate(ROWS):
        for place, response in enumerate(responses):
            alone = SegmentBatch.from_documents([prompt + response])
            score = found.scores[row, place].item()
            assert score == pytest.approx(model.scores(alone).item(), abs=1e-5) if response else math.isnan(score)
    verbosity = found.grades[..., GRADED.index("verbosity")]
    assert verbosity.tolist() == [[2, -1, -1], [-1, -1, 0], [-1, -1, -1], [-1, -1, -1]]
    logits = model.grading["verbosity"](model.read(SegmentBatch.from_documents([[7, 8, 4, 9]])))
    assert found.predicted_grades["verbosity"][1, 2] == logits.argmax()


def rankings(scores, lengths, strength, grades=None, predicted=None):
    grades = torch.full((len(scores), 3, len(GRADED)), -1) if grades is None else grades
    scores = torch.tensor(scores, dtype=torch.float64)
    return Rankings(scores, torch.tensor(lengths), torch.tensor(strength), grades, predicted or {})


def test_figures_by_hand():
    grades = torch.full((4, 3, len(GRADED)), -1)
    grades[0, 0, 2], grades[1, 1, 2], grades[2, 0, 2] = 1, 2, 0
    found = rankings(
        scores=[[2.0, 1.0, 3.0], [0.0, 1.0, 0.5], [1.0, 1.0, NAN], [4.0, 0.0, NAN]],
        lengths=[[3, 2, 5], [1, 1, 1], [4, 4, 0], [2, 6, 0]],
        strength=[4, 2, 2, 4],
        grades=grades,
        predicted={GRADED[2]: torch.tensor([[1, 0, 0], [0, 2, 0], [2, 0, 0], [0, 0, 0]])},
    )
    metrics = reward_metrics(found)
    assert metrics["preference/accuracy"] == 2.5 / 4  # a tie counts one half
    assert (metrics["preference/accuracy_slightly"], metrics["preference/accuracy_significantly"]) == (0.25, 1)
    assert metrics["preference/edited_first"] == 0.5
    assert metrics["preference/margins"] == pytest.approx((1 - 1 + 0 + 4) / 4)
    assert metrics[f"grading/{GRADED[2]}"] == pytest.approx(2 / 3)
    assert metrics["preference/calibration_error"] == pytest.approx(plain_calibration_error([1, -1, 0, 4], 20))
    assert math.isfinite(metrics["preference/length_correlation"])


def test_what_the_rows_do_not_decide_is_left_out():
    metrics = reward_metrics(rankings([[1.0, 0.0, NAN]], [[3, 3, 0]], [0]))
    assert set(metrics) == {"preference/accuracy", "preference/calibration_error", "preference/margins"}


def plain_calibration_error(margins, bins):
    """Counted in Python, each pair both ways round."""
    asked = [(p, t) for m in margins for p, t in ((1 / (1 + math.exp(-m)), 1.0), (1 / (1 + math.exp(m)), 0.0))]
    total = 0.0
    for number in range(bins):
        own = [(p, t) for p, t in asked if min(int(p * bins), bins - 1) == number]
        total += abs(math.fsum(p for p, _ in own) - math.fsum(t for _, t in own))
    return total / len(asked)


@given(st.lists(st.floats(-4, 4).filter(lambda m: abs(20 / (1 + math.exp(-m)) % 1 - 0.5) < 0.49), min_size=1))
def test_calibration_error_is_counted_right(margins):
    found = calibration_error(torch.tensor(margins, dtype=torch.float64))
    assert found == pytest.approx(plain_calibration_error(margins, 20), abs=1e-5)


def test_calibration_of_models_that_are_known():
    """Pairs that are won as often as their margin says are calibrated; a margin twice as large says too much."""
    chance = random.Random(0)
    margins = []
    for _ in range(20_000):
        size = chance.uniform(0, 3)
        margins.append(size if chance.random() < 1 / (1 + math.exp(-size)) else -size)
    margins = torch.tensor(margins)
    assert calibration_error(margins) < 0.015
    assert calibration_error(2 * margins) > 0.08
    assert calibration_error(torch.zeros(10)) == 0  # it knows nothing, and says so
    strength = torch.tensor([2, 4] * 10_000)
    table = calibration_table(margins, strength)
    assert [(entry["strength"], entry["pairs"]) for entry in table] == [
        ("all", 20_000),
        ("slightly", 10_000),
        ("significantly", 10_000),
    ]
    for entry in table:
        assert sum(each["pairs"] for each in entry["bins"]) == entry["pairs"]
        for each in entry["bins"]:
            assert each["begin"] <= each["predicted"] < each["end"]
            assert each["frequency"] == pytest.approx(each["predicted"], abs=0.05)
    assert table[1]["predicted"] == pytest.approx(margins[::2].sigmoid().mean().item())


def test_strengths_by_their_words():
    found = by_strength(torch.tensor([0, 3, 1, 3]))
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "unknown": [True, False, False, False],
        "negligibly": [False, False, True, False],
        "clearly": [False, True, False, True],
    }


def test_length_counts_among_the_responses_to_one_prompt_alone():
    lengths = torch.tensor([[1.0, 3.0, 5.0], [10.0, 40.0, NAN], [7.0, 7.0, NAN]])
    offset = torch.tensor([[100.0], [-50.0], [3.0]])  # a reward is known up to a constant of its prompt
    assert length_correlation(2 * lengths + offset, lengths) == pytest.approx(1, abs=1e-6)
    assert length_correlation(offset - lengths, lengths) == pytest.approx(-1, abs=1e-6)
    scores = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, NAN], [5.0, 1.0, NAN]])
    x = [0, -1, 1, -1.5, 1.5, 2, -2]  # less the mean of the prompt
    y = [-2, 0, 2, -15, 15, 0, 0]
    expected = sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    assert length_correlation(scores, lengths) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(length_correlation(scores, torch.full((3, 3), 4.0)))
