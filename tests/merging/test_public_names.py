"""What `lightning_llm.merging` offers by name is there, and is what the stage `merge` merges with."""

import pytest
import torch

import lightning_llm.merging as merging
from lightning_llm.merging import methods
from lightning_llm.merging.states import Merge


@pytest.mark.parametrize("name", merging.__all__)
def test_every_name_is_a_way_to_merge(name):
    assert isinstance(getattr(merging, name), Merge)
    assert getattr(merging, name).__name__ == name


@pytest.mark.parametrize("name", ["linear", "slerp_task_vectors", "task_arithmetic", "ties", "dare", "liti"])
def test_the_stage_merges_with_the_same(name):
    assert getattr(methods, name) is getattr(merging, name)


def test_states_are_merged_at_once():
    a, b = {"norm.weight": torch.tensor([1.0, 3.0])}, {"norm.weight": torch.tensor([3.0, 3.0])}
    assert merging.linear([a, b])["norm.weight"].tolist() == [2.0, 3.0]
    assert merging.liti(a, b, eta=0.25)["norm.weight"].tolist() == [1.5, 3.0]


def test_another_name_is_refused():
    name = "sum_of_models"
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(merging, name)
