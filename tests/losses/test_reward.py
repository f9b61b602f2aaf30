"""Reward models' losses against their formulas in plain floats, and where they have their minimum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.losses.reward import (
    bradley_terry_loss,
    grading_loss,
    margins,
    preference_probabilities,
    ranked_loss,
    soft_label_loss,
)

scores = st.floats(-300, 300)


def cost(x):
    """-log sigmoid(x), for any x."""
    return max(-x, 0) + math.log1p(math.exp(-abs(x)))


def exact(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


@given(scores, scores, scores, st.floats(0, 3), st.floats(0.01, 0.99))
def test_each_loss_is_its_formula(a, b, c, margin, p):
    found = [
        bradley_terry_loss(*exact(a, b)),
        bradley_terry_loss(*exact(a, b, margin)),
        soft_label_loss(*exact(a, b, p)),
        ranked_loss(*exact(a, b, c)),
    ]
    expected = [
        cost(a - b),
        cost(a - b - margin),
        p * cost(a - b) + (1 - p) * cost(b - a),
        (cost(a - b) + cost(b - c) + cost(a - c)) / 3,
    ]
    assert [loss.item() for loss in found] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("strength", "ahead"), [(1, 0.619), (2, 1.099), (3, 1.735), (4, 2.944)])
def test_soft_labels_rest_where_the_scores_say_the_probability(strength, ahead):
    probability = preference_probabilities(torch.tensor([strength])).double()
    rest = math.log(probability.item() / (1 - probability.item()))
    assert rest == pytest.approx(ahead, abs=1e-3)
    slopes = []
    for chosen in exact(rest - 0.1, rest, rest + 0.1):
        chosen.requires_grad_()
        soft_label_loss(chosen, torch.zeros_like(chosen), probability).sum().backward()
        slopes.append(chosen.grad.item())
    assert slopes[0] < -1e-3
    assert abs(slopes[1]) < 1e-12
    assert slopes[2] > 1e-3


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_soft_labels_and_grades_rest_together_where_each_rests_alone(weight):
    """Scores at the logit of the probability, grades at the share in which they were given: no weight moves that."""
    probability = preference_probabilities(torch.tensor([1, 4])).double()
    grades = torch.tensor([0] * 2 + [1] * 5 + [2] * 3)
    ahead, logits = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (2, 3))
    optimizer = torch.optim.LBFGS([ahead, logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = soft_label_loss(ahead, torch.zeros_like(ahead), probability).sum()
        loss = loss + weight * grading_loss(logits.expand(len(grades), 3), grades).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert ahead.tolist() == pytest.approx([math.log(0.65 / 0.35), math.log(0.95 / 0.05)], abs=1e-5)
    assert logits.softmax(0).tolist() == pytest.approx([0.2, 0.5, 0.3], abs=1e-6)


def test_grades_cost_the_log_likelihood_of_each_and_nothing_where_none_was_given():
    logits = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grades = torch.tensor([[0, 2, -1, 1], [-1, -1, 0, 2]])
    found = grading_loss(logits, grades)
    for place in [(i, j) for i in range(2) for j in range(4)]:
        row, grade = logits[place].tolist(), grades[place].item()
        expected = math.log(math.fsum(map(math.exp, row))) - row[grade] if grade >= 0 else 0.0
        assert found[place].item() == pytest.approx(expected)


def test_tables_by_strength():
    strength = torch.tensor([0, 1, 2, 3, 4])
    assert margins(strength, "large").tolist() == [0, 0, 1, 2, 3]
    assert margins(strength, "small").tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert preference_probabilities(strength).tolist() == pytest.approx([0.85, 0.65, 0.75, 0.85, 0.95])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: margins(torch.tensor([5]), "large"), "1 to 4"),
        (lambda: margins(torch.tensor([1]), "huge"), "small or large"),
        (lambda: preference_probabilities(torch.tensor([-1])), "1 to 4"),
        (lambda: soft_label_loss(*exact(1, 0, 1.0)), r"\(0, 1\)"),
    ],
)
def test_mistakes(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
