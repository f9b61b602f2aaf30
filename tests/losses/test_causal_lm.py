"""The causal language model's loss against the plain formula in float64, and what its mask leaves out."""

import pytest
import torch

from lightning_llm.losses.causal_lm import causal_lm_loss

TARGETS, WIDTH, VOCABULARY = 13, 6, 11


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TARGETS, WIDTH, generator=generator, dtype=dtype).mul(3).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    ids = torch.randint(VOCABULARY, (TARGETS,), generator=generator)
    mask = torch.rand(TARGETS, generator=generator) < 0.6
    return hidden, weight, ids, mask


def plain(hidden, weight, ids, mask, softcap):
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return -sum(logits[i].softmax(0)[ids[i]].log() for i in range(TARGETS) if mask[i])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_it_is_the_plain_formula_with_its_gradients(softcap):
    hidden, weight, ids, mask = inputs()
    got = causal_lm_loss(hidden, weight, ids, mask, softcap=softcap)
    expected = plain(hidden, weight, ids, mask, softcap)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(got, (hidden, weight)), wanted)


def test_a_masked_target_neither_costs_nor_teaches_whatever_its_values_are():
    hidden, weight, ids, mask = inputs()
    other = ids.where(mask, (ids + 1) % VOCABULARY)
    assert mask.any()
    assert not mask.all()
    assert causal_lm_loss(hidden, weight, ids, mask) == causal_lm_loss(hidden, weight, other, mask)
    (gradient,) = torch.autograd.grad(causal_lm_loss(hidden, weight, ids, mask), hidden)
    assert not gradient[~mask].any()
    assert gradient[mask].all(1).all()


def test_without_any_target_it_is_zero_and_so_are_its_gradients():
    hidden, weight, ids, mask = inputs()
    loss = causal_lm_loss(hidden, weight, ids, torch.zeros_like(mask))
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))
