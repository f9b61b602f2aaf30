"""The load-balancing loss against transformers', and at the ends of its range."""

import pytest
import torch
from torch.nn.functional import one_hot

from lightning_llm.losses.load_balance import load_balancing_loss, load_imbalance


@pytest.mark.parametrize(("layers", "tokens", "experts", "chosen"), [(1, 9, 4, 1), (3, 31, 7, 2), (2, 64, 16, 5)])
def test_value_and_gradient_equal_transformers(layers, tokens, experts, chosen):
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    logits = torch.randn(layers, tokens, experts, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = load_balancing_loss_func(tuple(logits.unbind()), experts, chosen)
    (wanted,) = torch.autograd.grad(expected, logits)
    probabilities = logits.softmax(-1)
    load = one_hot(probabilities.topk(chosen).indices, experts).sum((1, 2)).float()
    found = load_balancing_loss(probabilities.sum(1), load, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], wanted, rtol=1e-5, atol=1e-7)


def test_even_routing_costs_the_experts_per_token_and_collapse_the_number_of_experts():
    even = torch.full((2, 4), 25.0)
    assert load_balancing_loss(even, 2 * even, 100).item() == pytest.approx(2)
    collapsed = torch.tensor([[100.0, 0, 0, 0]] * 2)
    assert load_balancing_loss(collapsed, collapsed, 100).item() == pytest.approx(4)
    assert load_imbalance(even).item() == 1
    assert load_imbalance(collapsed).item() == 4
