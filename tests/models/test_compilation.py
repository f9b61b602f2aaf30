"""torch.compile on parts of a model: the same numbers, one graph for batches of any shape, clean names."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.compilation import compile_parts, refuse_absent_compiler
from lightning_llm.models.masked import MaskedTransformer
from lightning_llm.settings import UserError

# what torch's tracer and its imports do to themselves
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]
ROOT = Path(__file__).parents[2]


def has_compiler():
    try:
        refuse_absent_compiler("cpu")
    except UserError:
        return False
    return True


@pytest.fixture
def compiled():
    """A model and its compiled copy."""
    if not has_compiler():
        pytest.skip("needs a C++ compiler: apt-get install g++")
    config = ModelConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Transformer(config)
    model.reset_parameters(seed=0)
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    counters.clear()
    compile_parts(other)
    yield model, other
    torch._dynamo.reset()


def batch_of(*lengths):
    chance = torch.Generator().manual_seed(sum(lengths))
    return SegmentBatch.from_documents([torch.randint(40, (n,), generator=chance).tolist() for n in lengths])


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_compiled_parts_agree_and_share_a_graph(compiled, again):
    model, other = compiled
    assert list(other.state_dict()) == list(model.state_dict())
    other.activation_checkpointing = again
    shapes = [(7, 5), (30,), (2, 3, 4, 5), (64, 64, 1), (11, 12), (100,), (3,), (17, 2), (8, 9, 10)]
    for lengths in shapes:  # more than the eight after which torch would give up compiling
        batch = batch_of(*lengths)
        for each in compiled:
            each.zero_grad()
            (each(batch) * torch.linspace(-1, 1, 32)).sum().backward()
        for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4, msg=name)
        torch.testing.assert_close(model(batch), other(batch), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2  # a feed-forward, a norm
    with torch.no_grad():
        for lengths in shapes:
            torch.testing.assert_close(model(batch_of(*lengths)), other(batch_of(*lengths)), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 4  # and both without a backward pass
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_model_is_saved_and_copied_as_any(compiled, tmp_path):
    _, other = compiled
    batch = batch_of(9, 4)
    expected = other(batch)
    other.save_pretrained(tmp_path)
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path)(batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(other)(batch), expected, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_nothing_begins(tiny, tmp_path):
    script = "import sys; from lightning_llm.cli import main; sys.exit(main())"
    words = ["run", "recipe=qwen2", *tiny, "compute.compile=true"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CXX": str(tmp_path / "no-compiler")}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: compute.compile: finds no C++ compiler. Install g++ or name one in CXX, or leave compile off.\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_compiled_part_follows_the_masks_of_each_pass(compiled):
    """And hands them gradients (models/masked.py)."""
    model, other = (MaskedTransformer.from_backbone(each, seed=1) for each in compiled)
    compile_parts(other)
    for budget in (48.0, 30.0, 17.0):
        found = []
        for each in (model, other):
            each.budget, each.temperature = budget, 0.3
            each.zero_grad()
            hidden = each(batch_of(5, 9))
            hidden.square().sum().backward()
            found.append((hidden.detach(), torch.stack([z.grad for z in each.mask_scores])))
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
