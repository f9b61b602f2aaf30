"""The optimizer step: the same update for any split into micro-batches, and what masked tokens may not do."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.objectives.causal_lm import CausalLM
from lightning_llm.objectives.config import CausalLMConfig, DPOConfig, IPOConfig
from lightning_llm.optimization.config import AdamWConfig
from lightning_llm.optimization.optimizers import build_adamw
from lightning_llm.optimization.window import LossSum, Totals, optimizer_step

# keys' biases have no gradient but rounding noise; a larger eps than usual keeps AdamW from making steps of that
ADAMW = AdamWConfig(eps=1e-5)


@pytest.fixture
def model():
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = Transformer(config)
    model.reset_parameters(seed=1)
    return model


def documents(lengths=(40, 3, 17, 2, 30, 9)):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(50, (length,), generator=generator).numpy() for length in lengths]
    masks = [(torch.rand(length, generator=generator) < 0.7).numpy() for length in lengths]
    return ids, masks


def batch(indices):
    ids, masks = documents()
    return SegmentBatch.from_documents([ids[i] for i in indices], [masks[i] for i in indices])


def masked():
    return SegmentBatch.from_documents([[1, 2, 3]], [[False] * 3])


def step(model, micro_batches, **named):
    """One step on a copy of the model."""
    model = copy.deepcopy(model)
    objective = CausalLM(CausalLMConfig(), model)
    units = sum(sum(micro.target_counts) for micro in micro_batches)
    optimizer = build_adamw(ADAMW, model)
    named = {"learning_rate": 2e-3, "clip_norm": 0.5} | named
    totals = optimizer_step(objective.loss, micro_batches, optimizer, units=units, **named)
    return model, totals, optimizer


SPLITS = {
    "one by one": [[0], [1], [2], [3], [4], [5]],
    "halves": [[0, 1, 2], [3, 4, 5]],
    "another order": [[5, 2], [4, 0, 1, 3]],
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_any_split_gives_the_same_update(model, split):
    whole, totals, _ = step(model, [batch(range(6))])
    parts, split_totals, _ = step(model, [*(batch(part) for part in split), masked()])
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert split_totals.means() == pytest.approx(totals.means(), rel=1e-5)


@pytest.mark.parametrize(
    "config", [DPOConfig(beta=0.3, nll_weight=1.0, mask_formatting=True), IPOConfig(beta=0.2)], ids=["dpo", "ipo"]
)
def test_any_split_of_pairs_gives_the_same_update(model, config):
    ids, _ = documents((7, 4, 9, 3, 12, 5, 2, 2, 30))
    groups = [(ids[i], ids[i + 1 : i + 3]) for i in (0, 3, 6)]  # prompts with their two responses, of unlike lengths
    reference = copy.deepcopy(model)
    reference.reset_parameters(seed=2)

    def step_of(*parts):
        policy = copy.deepcopy(model)
        batches = [SegmentBatch.from_groups(*zip(*(groups[i] for i in part), strict=True)) for part in parts]
        objective = config.build(policy, reference=reference, formatting_ids={int(ids[1][0])})
        optimizer = build_adamw(ADAMW, policy)
        totals = optimizer_step(objective.loss, batches, optimizer, units=3, learning_rate=2e-3, clip_norm=0.5)
        return policy, totals.means()

    whole, means = step_of([0, 1, 2])
    for parts in ([[0], [1], [2]], [[2, 0], [1]]):
        split, split_means = step_of(*parts)
        for one, other in zip(whole.parameters(), split.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert split_means == pytest.approx(means, rel=1e-5, abs=1e-5)


def test_gradient_is_that_of_the_mean_over_all_targets(model):
    _, totals, _ = step(model, [batch([0, 1]), batch([2, 3, 4, 5])])
    whole = batch(range(6))
    logits = model.logits(model(whole))[whole.predictors][whole.target_mask]
    loss = cross_entropy(logits.double(), whole.target_ids[whole.target_mask])
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert totals.means() == pytest.approx({"loss": loss.item(), "grad_norm": norm.item()}, rel=1e-5)


@pytest.mark.parametrize("place", [0, 1], ids=["first", "last"])
def test_a_micro_batch_in_which_nothing_counts_adds_exactly_zero(model, place):
    micro_batches = [batch([0])]
    without, totals, _ = step(model, micro_batches)
    micro_batches.insert(place, masked())
    with_masked, masked_totals, _ = step(model, micro_batches)
    for one, other in zip(without.parameters(), with_masked.parameters(), strict=True):
        assert torch.equal(one, other)
    assert masked_totals.means() == totals.means()


def test_a_step_in_which_nothing_counts_moves_nothing(model):
    stepped, _, optimizer = step(model, [batch([0])])  # from here on there is momentum, and decay
    before = copy.deepcopy(stepped)
    objective = CausalLM(CausalLMConfig(), stepped)
    totals = optimizer_step(objective.loss, [masked()], optimizer, units=0, learning_rate=0.1)
    assert totals.means() == {}
    for one, other in zip(before.parameters(), stepped.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_learning_rate_is_set_before_the_step_and_scaled_by_group(model):
    optimizer = build_adamw(ADAMW, model)
    optimizer.param_groups[1]["lr_scale"] = 0.0
    before = copy.deepcopy(model)
    optimizer_step(CausalLM(CausalLMConfig(), model).loss, [batch([0])], optimizer, units=10, learning_rate=0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0]
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) == (new.ndim < 2), name


def test_clipping_bounds_the_gradient_and_reports_it_unclipped(model):
    _, free, _ = step(model, [batch([0])], clip_norm=0.0)
    clipped, totals, _ = step(model, [batch([0])], clip_norm=0.01)
    assert totals.means()["grad_norm"] == free.means()["grad_norm"] > 0.01
    assert torch.cat([p.grad.flatten() for p in clipped.parameters()]).norm() == pytest.approx(0.01, rel=1e-3)


def test_gradients_are_exchanged_in_the_last_micro_batch_alone(model):
    entered = []

    class NoSync:
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *_):
            pass

    step(model, [batch([0]), batch([1]), batch([2])], no_sync=NoSync)
    assert len(entered) == 2


def test_totals_divide_once_and_over_all_ranks():
    totals = Totals()
    totals.add_loss(LossSum(torch.tensor(6.0), 2, {"rewards/chosen": (torch.tensor(1.0), 2)}))
    totals.add_loss(LossSum(torch.tensor(0.0), 0, {"rewards/chosen": (torch.tensor(0.0), 0)}))
    assert totals.means() == {"loss": 3.0, "rewards/chosen": 0.5}
    everyone = totals.means(lambda own: [own, {"loss": (0.0, 4.0), "nll": (3.0, 1.0)}])
    assert everyone == {"loss": 1.0, "rewards/chosen": 0.5, "nll": 3.0}
    totals.add("nothing", 0.0, 0)
    assert "nothing" not in totals.means()
