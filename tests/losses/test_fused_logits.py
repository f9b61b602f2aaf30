"""The kernels in half precision on a GPU, against the plain formula in float64 of the same rounded logits, and through
the loss against what torch's operations give."""

import pytest
import torch

from lightning_llm.losses.likelihood import token_log_likelihood

pytestmark = pytest.mark.gpu
DEVICE, TOKENS, WIDTH = "cuda", 37, 64
VOCABULARIES = (100, 4096, 9001)  # within one block of a kernel, just one, and not a multiple
CAPS = ((None, 1.0), (5.0, 1.0), (5.0, 0.5), (None, 2.0))


def case(vocabulary, k, has_tail, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(TOKENS, vocabulary, generator=generator)).bfloat16()
    ids = torch.randint(vocabulary, (TOKENS, k), generator=generator)
    if k > 2:
        ids[::3, 1] = ids[::3, 0]  # a target that is listed twice
    weights, factors = torch.rand(TOKENS, k, generator=generator), torch.rand(TOKENS, generator=generator)
    tail = torch.rand(TOKENS, generator=generator) if has_tail else None
    return [None if x is None else x.to(DEVICE) for x in (logits, ids, weights, tail, factors)]


def plain(logits, ids, weights, tail, factors, softcap, temperature):
    """Values and the gradient for the plain logits, in float64."""
    logits = logits.double().requires_grad_()
    capped = logits if softcap is None else softcap * (logits / softcap).tanh()
    log_p = (capped / temperature).log_softmax(1)
    values = (weights * log_p.gather(1, ids)).sum(1)
    if tail is not None:
        others = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
        values = values + tail * others
    return values.detach(), torch.autograd.grad((factors * values).sum(), logits)[0]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(("softcap", "temperature"), CAPS)
@pytest.mark.parametrize(("k", "has_tail"), [(1, False), (1, True), (5, False), (5, True)])
def test_values_and_gradients(vocabulary, softcap, temperature, k, has_tail):
    from lightning_llm.losses.fused_logits import FusedLogits
    from lightning_llm.losses.likelihood import _Likelihood, _Targets

    logits, ids, weights, tail, factors = case(vocabulary, k, has_tail)
    expected, gradient = plain(logits, ids, weights, tail, factors, softcap, temperature)
    found = _Likelihood(FusedLogits(logits.clone(), softcap, temperature), _Targets(ids, weights, tail))
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-5, atol=1e-4)
    grad = found.grad_logits(factors / temperature)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), gradient, rtol=2**-7, atol=1e-6)


def test_a_row_of_hidden_entries_sums_to_nothing():
    from lightning_llm.losses.fused_logits import FusedLogits

    logits = torch.full((2, 5000), -torch.inf, dtype=torch.bfloat16, device=DEVICE)
    logits[1, 4500] = 3
    top, log_sum = FusedLogits(logits, None, 1.0).sum_()
    assert top.squeeze(1).tolist() == [-torch.inf, 3]
    assert log_sum.squeeze(1).tolist() == [-torch.inf, 0]


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("in_forward", [True, False])
def test_the_loss_is_that_of_torchs_operations(softcap, in_forward, monkeypatch):
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(9001, WIDTH, generator=generator, device=DEVICE) / 4).requires_grad_()
    ids = torch.randint(9001, (TOKENS,), generator=generator, device=DEVICE)
    factors = torch.rand(TOKENS, generator=generator, device=DEVICE)
    factors[::4] = 0

    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            options = {"token_weights": factors} if in_forward else {}
            values = token_log_likelihood(hidden, weight, ids, softcap=softcap, chunk=16, **options)
            values = values if in_forward else values * factors
        return values, *torch.autograd.grad(values.sum(), (hidden, weight))

    asked = []
    found = run()
    monkeypatch.setattr("lightning_llm.losses.likelihood.kernels_run", lambda: bool(asked.append(True)))
    expected = run()
    assert asked  # else both were the kernels
    for ours, theirs, tolerance in zip(found, expected, (1e-4, 2e-2, 2e-2), strict=True):
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=tolerance, atol=tolerance * theirs.abs().max().item()
        )
