"""Reward modelling on batches out of a token store: each loss, an edited response, strengths and grades."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import GRADED
from lightning_llm.data.packing import Feed, build_batch, iterate_batches
from lightning_llm.data.token_store import TokenStore, TokenStoreWriter
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.reward import RewardModel
from lightning_llm.objectives.config import RewardModelConfig

PROMPT = [1, 2, 3]
GRADES = {"chosen": {"verbosity": 2}, "edited": {"harmlessness": 0}}
ROWS = [  # responses, and what is known of them
    ([[4, 9], [5, 5, 9], []], {"strength": 4}),
    (
        [[6, 9], [7, 9], [8, 4, 9]],
        {"strength": 1, "grades": {"chosen": {"verbosity": 2}, "edited": {"harmlessness": 0}}},
    ),
    ([[5, 9], [8, 9], []], {}),
]


@pytest.fixture
def backbone():
    sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    config = ModelConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    model = Transformer(config)
    model.reset_parameters(1)
    return model


@pytest.fixture
def feed(tmp_path):
    writer = TokenStoreWriter(tmp_path, "rankings", 20)
    for responses, known in ROWS:
        writer.append([PROMPT, *responses], [[False] * 3, *([True] * len(ids) for ids in responses)], known)
    writer.close()
    return Feed("rankings", TokenStore.open(tmp_path), 64, "stop", {})


@pytest.fixture
def batch(feed):
    (found,) = (batch for batch, _ in iterate_batches(feed, 64, 1000))
    return found


def plain_scores(model):
    """Of every response [row][response], each a document of its own."""
    return [
        [model.scores(SegmentBatch.from_documents([PROMPT + response])).squeeze() for response in responses if response]
        for responses, _ in ROWS
    ]


def cost(better, worse, margin=0.0):
    return -logsigmoid(better - worse - margin)


def test_a_store_gives_each_prompt_its_responses_and_what_is_known(batch, feed):
    assert batch.lengths == [3, 2, 3, 3, 2, 2, 3, 3, 2, 2]
    assert batch.prefixes == [-1, 0, 0, -1, 3, 3, 3, -1, 7, 7]
    assert batch.columns["strength"].tolist() == [4, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    grades = batch.columns["grades"]
    graded = {(s, GRADED[c]): grades[s, c].item() for s, c in (grades >= 0).nonzero().tolist()}
    assert graded == {(4, "verbosity"): 2, (6, "harmlessness"): 0}
    assert feed.store.row_contexts.tolist() == [6, 6, 5]


LOSSES = {
    "llama 3": (RewardModelConfig(), lambda better, worse, strength: cost(better, worse)),
    "llama 2, large": (
        RewardModelConfig(margins="large"),
        lambda better, worse, strength: cost(better, worse, {4: 3.0, 1: 0.0, 0: 0.0}[strength]),
    ),
    "llama 2, small": (
        RewardModelConfig(margins="small"),
        lambda better, worse, strength: cost(better, worse, {4: 1.0, 1: 0.0, 0: 0.0}[strength]),
    ),
    "afm": (
        RewardModelConfig(loss="soft_labels"),
        lambda better, worse, strength: (
            (p := {4: 0.95, 1: 0.65, 0: 0.85}[strength]) * cost(better, worse) + (1 - p) * cost(worse, better)
        ),
    ),
}


@pytest.mark.parametrize(("config", "pair"), LOSSES.values(), ids=LOSSES.keys())
def test_each_loss_with_an_edited_response_above_both(config, pair, backbone, batch):
    objective = config.build(backbone, seed=3)
    expected = []
    for (chosen, rejected, *edited), (_, known) in zip(plain_scores(objective.model), ROWS, strict=True):
        own = pair(chosen, rejected, known.get("strength", 0))
        above = [cost(edited[0], chosen), cost(edited[0], rejected)] if edited else []
        expected.append(sum([own, *above]) / (1 + len(above)))
    part = objective.loss(batch)
    torch.testing.assert_close(part.loss, torch.stack(expected).sum(), rtol=1e-5, atol=1e-5)
    assert part.count == 3
    margins = [chosen - rejected for chosen, rejected, *_ in plain_scores(objective.model)]
    torch.testing.assert_close(
        part.metrics["rewards/margins"][0], torch.stack(margins).sum().detach(), rtol=1e-4, atol=1e-5
    )
    assert part.metrics["rewards/accuracies"] == (sum(margin > 0 for margin in margins), 3)


def test_grades_and_centring(backbone, batch):
    plain = RewardModelConfig().build(copy.deepcopy(backbone), seed=3)
    config = RewardModelConfig(graded=list(GRADED), grading_weight=0.5, centre_weight=0.01)
    objective = config.build(backbone, seed=3)
    found, base = objective.loss(batch), plain.loss(batch)
    read = objective.model.read(batch)
    heads = objective.model.grading
    grades = cross_entropy(heads["verbosity"](read[4])[None], torch.tensor([2]))
    grades = grades + cross_entropy(heads["harmlessness"](read[6])[None], torch.tensor([0]))
    centre = sum((chosen + rejected) ** 2 for chosen, rejected, *_ in plain_scores(objective.model))
    torch.testing.assert_close(found.loss, base.loss + 0.5 * grades + 0.01 * centre, rtol=1e-5, atol=1e-5)
    assert found.metrics["grading/accuracy"][1] == 2
    found.loss.backward()
    assert heads["verbosity"][0].weight.grad.abs().max() > 0
    assert heads["truthfulness"][0].weight.grad.abs().max() == 0


@pytest.mark.parametrize("graded", [[], list(GRADED)])
def test_the_split_changes_nothing_and_a_filler_counts_nothing(graded, backbone, feed, batch):
    objective = RewardModelConfig(graded=graded).build(backbone, seed=3)
    whole = objective.loss(batch)
    parts = [objective.loss(part) for part, _ in iterate_batches(feed, 64, 1)]
    assert [part.count for part in parts] == [1, 1, 1]
    torch.testing.assert_close(whole.loss, torch.stack([part.loss for part in parts]).sum(), rtol=1e-5, atol=1e-5)
    filler = objective.loss(build_batch([feed], []))
    filler.loss.backward()
    assert (filler.loss.item(), filler.count) == (0, 0)


def test_a_reward_model_that_is_there_goes_on(backbone):
    model = RewardModel.from_backbone(backbone, 3, ["verbosity"])
    assert RewardModelConfig(graded=["verbosity"]).build(model, seed=4).model is model
    other = RewardModelConfig().build(model, seed=4).model
    assert not len(other.grading)


def test_it_learns(backbone, batch):
    objective = RewardModelConfig().build(backbone, seed=3)
    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective.loss(batch).loss
        loss.backward()
        optimizer.step()
    (chosen, rejected, edited) = plain_scores(objective.model)[1]
    assert edited > chosen > rejected
    assert loss < 0.1


@pytest.mark.parametrize(
    "wrong",
    [{"loss": "hinge"}, {"margins": "huge"}, {"loss": "soft_labels", "margins": "large"}, {"graded": ["wit"]},
     {"grading_weight": -1.0}],
)  # fmt: skip
def test_settings_that_mean_nothing(wrong):
    with pytest.raises(ValueError, match=next(iter({"margins", "loss", "graded", "grading_weight"} & wrong.keys()))):
        RewardModelConfig(**wrong)
