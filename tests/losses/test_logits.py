"""Logits by torch's operations, and what the kernels of a GPU share with them; both by `likelihood` elsewhere."""

import torch

from lightning_llm.losses.logits import ComposedLogits, grouped, kernels_run, sums_over_equals

IDS = torch.tensor([[4, 1, 4, 4, 2], [3, 3, 0, 1, 0]])


def test_equal_ids_are_one_group():
    group, is_first = grouped(IDS)
    for row in range(2):
        for i in range(5):
            assert [bool(group[row, i] == group[row, j]) for j in range(5)] == (IDS[row] == IDS[row, i]).tolist()
    assert is_first.tolist() == [[True, True, False, False, True], [True, False, True, True, False]]
    values = torch.tensor([[1.0, 2, 4, 8, 16], [1, 2, 4, 8, 16]])
    assert sums_over_equals(IDS, values).tolist() == [[13, 2, 13, 13, 16], [3, 3, 20, 8, 20]]


def test_many_targets_take_memory_for_each_and_not_for_each_pair():
    ids = torch.randint(50, (4, 20_000), generator=torch.Generator().manual_seed(0))  # pairs would take 1.6 GB a row
    sums = sums_over_equals(ids, torch.ones(ids.shape))
    for row in range(4):
        assert sums[row].tolist() == torch.bincount(ids[row])[ids[row]].tolist()
        assert int(grouped(ids)[1][row].sum()) == 50


def test_hidden_ids_are_in_no_sum_and_get_what_is_given():
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    composed = ComposedLogits(logits.clone())
    torch.testing.assert_close(composed.at(IDS), logits.gather(1, IDS))
    is_one = composed.hide_(IDS)
    assert sums_over_equals(IDS, is_one.long()).tolist() == [[1] * 5] * 2  # one of each that are equal
    top, log_sum = composed.sum_()
    left = logits.scatter(1, IDS, -torch.inf)
    torch.testing.assert_close(top + log_sum, left.logsumexp(1, keepdim=True))
    grad = composed.gradient_(torch.tensor([[2.0], [3]]), IDS, torch.full((2, 5), 0.5), torch.ones(2, 5))
    assert grad.gather(1, IDS).tolist() == [[3.5, 1.5, 3.5, 3.5, 1.5], [2.5, 2.5, 2.5, 1.5, 2.5]]
    others = left.softmax(1) * torch.tensor([[2.0], [3]])
    torch.testing.assert_close(grad.scatter(1, IDS, 0.0), others)


def test_without_a_gpu_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert not kernels_run.__wrapped__()
