"""Losses on pairs against their published formulas in plain Python floats, and what must hold for any pair."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.losses.preference import chosen_nll, dpo_loss, formatting_mask, ipo_loss

CASES = {  # policy_chosen, policy_rejected, reference_chosen, reference_rejected, in nats
    "agree": (-20.0, -30.0, -20.0, -30.0),
    "right way": (-15.0, -40.0, -20.0, -30.0),
    "wrong way": (-40.0, -15.0, -20.0, -30.0),
    "far apart": (-1.0, -9000.0, -5000.0, -2.0),  # a naive log(sigmoid(x)) overflows here
}
nats = st.floats(-500, 0)


def plain_margin(case):
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = case
    return (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)


def plain_dpo(case, beta, noise):
    def cost(x):  # log(1 + exp(-x)), for any x
        return max(-x, 0) + math.log1p(math.exp(-abs(x)))

    margin = beta * plain_margin(case)
    return (1 - noise) * cost(margin) + noise * cost(-margin)


def one_pair(case, dtype=torch.float64):
    return torch.tensor(case, dtype=dtype).unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_dpo_is_the_published_formula(case, noise, beta, dtype):
    got = dpo_loss(*one_pair(case, dtype), beta=beta, label_smoothing=noise)
    expected = torch.tensor([plain_dpo(case, beta, noise)], dtype=dtype)
    precision = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, expected, rtol=precision, atol=precision)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ipo_is_the_published_formula(case, beta):
    expected = torch.tensor([(plain_margin(case) - 0.5 / beta) ** 2], dtype=torch.float64)
    torch.testing.assert_close(ipo_loss(*one_pair(case), beta=beta), expected)


@given(shift=st.floats(-100, 100), case=st.tuples(nats, nats, nats, nats))
def test_only_differences_from_the_reference_count(shift, case):
    for loss in (dpo_loss, ipo_loss):
        before, after = loss(*one_pair(case), beta=0.1), loss(*(one_pair(case) + shift), beta=0.1)
        torch.testing.assert_close(before, after, rtol=1e-8, atol=1e-8)


@given(case=st.tuples(nats, nats, nats, nats), noise=st.floats(0, 0.49))
def test_swapped_labels_are_what_label_smoothing_mixes_in(case, noise):
    right = dpo_loss(*one_pair(case), beta=0.1)
    wrong = dpo_loss(*one_pair((case[1], case[0], case[3], case[2])), beta=0.1)
    smoothed = dpo_loss(*one_pair(case), beta=0.1, label_smoothing=noise)
    torch.testing.assert_close(smoothed, (1 - noise) * right + noise * wrong)


def test_dpo_where_policy_equals_reference():
    chosen = torch.full((3,), -20.0, requires_grad=True)
    rejected = torch.full((3,), -30.0, requires_grad=True)
    loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1)
    torch.testing.assert_close(loss.detach(), torch.full((3,), math.log(2)))
    loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.full((3,), -0.1 / 2))  # -beta sigmoid(0)
    torch.testing.assert_close(rejected.grad, torch.full((3,), 0.1 / 2))


def test_dpo_gradient_of_a_pair_far_on_the_wrong_side_is_beta():
    chosen = torch.tensor([-9000.0], requires_grad=True)
    dpo_loss(chosen, torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([-5000.0]), beta=0.1).sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.1]))


def test_smoothed_dpo_is_content_at_a_finite_margin():
    noise, beta = 0.1, 0.1
    margin = math.log((1 - noise) / noise) / beta  # sigmoid(beta margin) = 1 - noise
    chosen = torch.tensor([-20.0 + margin], dtype=torch.float64, requires_grad=True)
    others = (torch.tensor([v], dtype=torch.float64) for v in (-30.0, -20.0, -30.0))
    dpo_loss(chosen, *others, beta=beta, label_smoothing=noise).sum().backward()
    torch.testing.assert_close(chosen.grad, torch.zeros(1, dtype=torch.float64), atol=1e-12, rtol=0)


def test_ipo_is_content_at_its_margin_and_pulls_back_beyond_it():
    chosen = torch.tensor([-20.0, -15.0, -10.0], requires_grad=True)  # margins 0, 5, 10 for a goal of 5
    rest = (torch.full((3,), v) for v in (-30.0, -20.0, -30.0))
    ipo_loss(chosen, *rest, beta=0.1).sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-10.0, 0.0, 10.0]))  # 2 (margin - 5)


def test_chosen_nll_is_per_token_and_costs_nothing_without_tokens():
    nll = chosen_nll(torch.tensor([-6.0, -2.0, 0.0]), torch.tensor([3, 4, 0]))
    torch.testing.assert_close(nll, torch.tensor([2.0, 0.5, 0.0]))


@given(st.lists(st.integers(0, 9), max_size=20), st.sets(st.integers(0, 9)))
def test_formatting_mask_marks_the_formatting_ids(ids, formatting):
    mask = formatting_mask(torch.tensor(ids, dtype=torch.int64), formatting)
    assert mask.tolist() == [i in formatting for i in ids]


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_beta_must_be_positive(beta):
    for loss in (dpo_loss, ipo_loss):
        with pytest.raises(ValueError, match="beta must be positive"):
            loss(*one_pair(CASES["agree"]), beta=beta)


@pytest.mark.parametrize("noise", [-0.1, 0.5])
def test_label_smoothing_must_leave_the_labels_likelier_right_than_wrong(noise):
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo_loss(*one_pair(CASES["agree"]), beta=0.1, label_smoothing=noise)
