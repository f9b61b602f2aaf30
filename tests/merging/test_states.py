"""A merge is computed block by block: the same numbers, and nothing in memory but its own tensor and some blocks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_llm.merging import dare, ema, linear, liti, slerp, slerp_task_vectors, states, task_arithmetic, ties

BLOCK = 1000
WEIGHTS = {"model.layers.0.wide": (90, 70), "model.layers.0.narrow": (7,), "model.layers.1.empty": (0, 4)}
MERGES = {
    "linear": lambda init, models: linear.lazily(models),
    "ema": lambda init, models: ema.lazily(models[0], init, 0.3),
    "liti": lambda init, models: liti.lazily(init, models[0], 0.3),
    "slerp": lambda init, models: slerp.lazily(models[0], models[1], 0.3),
    "slerp of task vectors": lambda init, models: slerp_task_vectors.lazily(init, models),
    "task arithmetic": lambda init, models: task_arithmetic.lazily(init, models, 0.3),
    "ties": lambda init, models: ties.lazily(init, models),
    "dare": lambda init, models: dare.lazily(init, models, density=1.0),
}


class Largest(TorchDispatchMode):
    """Notes the number of bytes of every storage that an operation has made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        before = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        for each in tree_leaves(found):
            if torch.is_tensor(each) and each.untyped_storage().data_ptr() not in before:
                self.made.append(each.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("name", [name for name in MERGES if name not in ("ties", "dare")])
def test_an_fp64_model_is_merged_in_fp64_whatever_the_type_of_the_others(name):
    generator = torch.Generator().manual_seed(0)
    init = {"w": torch.randn(50, generator=generator)}
    models = [{"w": torch.randn(50, dtype=torch.float64, generator=generator)} for _ in range(2)]
    merged = MERGES[name](init, models)["w"]
    wide = MERGES[name]({"w": init["w"].double()}, models)["w"]
    assert torch.equal(merged, wide.to(merged.dtype))


@pytest.fixture
def models():
    chance = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=chance) for name, shape in WEIGHTS.items()} for _ in range(4)]


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_is_the_same_in_blocks(name, models, monkeypatch):
    whole = dict(MERGES[name](models[0], models[1:]))
    monkeypatch.setattr(states, "BLOCK", BLOCK)
    blocks = dict(MERGES[name](models[0], models[1:]))
    for key in WEIGHTS:
        torch.testing.assert_close(blocks[key], whole[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MERGES)
def test_memory_is_one_tensor_and_some_blocks(name, models, monkeypatch):
    monkeypatch.setattr(states, "BLOCK", BLOCK)
    merged = MERGES[name](models[0], models[1:])
    with Largest() as largest:
        tensor = merged["model.layers.0.wide"]
    made = sorted(largest.made)
    assert made[-1] == tensor.nbytes > made[-2]  # itself, once
    assert made[-2] <= 8 * len(models) * BLOCK  # a block of each in fp64
