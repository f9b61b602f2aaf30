"""The live source without a trainer: what is drawn, judged, scored and shared, by weights and counters alone."""

import copy
import json

import numpy as np
import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.experience import Experience
from lightning_llm.data.token_store import TokenStoreWriter
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.evaluation.config import RandomConfig
from lightning_llm.evaluation.judges import JudgeContext, Response
from lightning_llm.generation.config import SamplingConfig
from lightning_llm.models import Transformer
from lightning_llm.settings import UserError
from lightning_llm.training.actor import Actor, Reference
from lightning_llm.training.config import RolloutConfig
from lightning_llm.training.rollout import Rollouts, figures

CONTEXT = 40


@pytest.fixture(scope="module")
def tokenizer(talker):
    return Tokenizer.load(talker)


@pytest.fixture
def policy(talker):
    return Transformer.from_pretrained(talker).train()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer):
    """Prompts of two sources, the last of which fills the context; four are held out."""
    folder = tmp_path_factory.mktemp("prompts")
    texts = {
        "fox": [f"fox {i}" for i in range(9)] + ["the quick brown fox " * 20],
        "dog": [f"dog {i}" for i in range(5)],
    }
    for name, rows in texts.items():
        for split, chosen in (("train", rows), ("validation", rows[:2])):
            writer = TokenStoreWriter(folder / "sources" / name / split, "prompts", tokenizer.vocab_size)
            for text in chosen:
                prompt = [{"role": "user", "content": text}]
                ids = tokenizer.render(prompt, add_generation_prompt=True).ids
                writer.append([ids], [[False] * len(ids)], {"prompt": prompt, "answer": "", "task": name})
            writer.close()
    return folder


DATA = DataConfig("both", "prompts", {"fox": SourceConfig(weight=2.0), "dog": SourceConfig()})


@pytest.fixture
def rollouts(policy, tokenizer, prepared, tmp_path):
    """`rollouts(**settings)` -> a live source of six steps."""

    def make(as_pairs=False, records="experience", steps_in_all=6, data=DATA, judging_cost=None, **named):
        config = RolloutConfig(**{"prompts": 6, "per_prompt": 3, "max_new_tokens": 6, "held_out": 3} | named)
        judge = RandomConfig().build(JudgeContext())
        parts = {"context": CONTEXT, "max_tokens": 200, "precision": "fp32", "seed": 7}
        actor = Actor(policy, judge, tokenizer, config, **parts)
        length = {"batch_ramp": [{"at": 0, "value": 100}], "total_tokens": 100 * steps_in_all}
        length |= {"judging_cost": judging_cost, "records": tmp_path / records}
        return Rollouts(prepared, data, actor, as_pairs=as_pairs, seed=7, **length)

    return make


def moved(policy, seed=0, by=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def dense_logps(model, prompt, response):
    """Of every token of a response, from the logits of the whole text."""
    with torch.no_grad():
        logits = model.logits(model(SegmentBatch.from_documents([prompt + response])))
    return logits.double().log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(response) - 1), response].numpy()


def test_what_models_compute_that_judge_counts_where_it_is_drawn(rollouts):
    """A billion FLOPs for each of six prompts and eighteen responses, and none for what is gone through again."""
    plain, judged = (
        rollouts(records=name, judging_cost=cost).window(0, micro_batch_tokens=200).flops
        for name, cost in (("plain", None), ("judged", lambda segments: 1e9 * len(segments)))
    )
    assert judged - plain == pytest.approx(24e9)
    again = rollouts(records="judged", judging_cost=lambda segments: 1e9 * len(segments))
    assert again.window(0, micro_batch_tokens=200).flops == 0


def test_records_hold_the_log_probabilities_of_policy_and_reference(rollouts, policy):
    live = rollouts()
    first = copy.deepcopy(policy)
    moved(policy)  # as if it had learnt
    live.window(0, micro_batch_tokens=100)
    record = Experience.load(live.records / "000000")
    assert (record.step, record.samples, len(record.groups)) == (0, 0, 6)
    for group in record.groups:
        assert len(group.responses) == 3
        for response in group.responses:
            expected = dense_logps(policy, group.prompt_ids, response.ids)
            np.testing.assert_allclose(response.sampled_logps, expected, rtol=0, atol=2e-4)
            np.testing.assert_allclose(response.sampler_logps, expected, rtol=0, atol=2e-4)
            np.testing.assert_allclose(
                response.reference_logps, dense_logps(first, group.prompt_ids, response.ids), rtol=0, atol=2e-4
            )
    assert policy.training


def test_each_record_is_drawn_by_the_newest_weights_and_used_as_long_as_is_asked(rollouts, policy):
    live = rollouts(steps=2, epochs=2, prompts=3, steps_in_all=10)
    seen, iterates = [], {}
    for step in range(10):
        number, turn = divmod(step, 4)
        if turn == 0:
            iterates[number] = copy.deepcopy(policy)
        window = live.window(step, micro_batch_tokens=1000)
        assert window.figures["staleness"] == (turn, 1)
        assert window.flops > 0 if turn == 0 else window.flops == 0
        seen.append(sorted(tuple(batch.input_ids.tolist()) for batch in window.mine))
        moved(policy, step)
    assert sorted(path.name for path in live.records.iterdir()) == ["000000", "000001", "000002"]
    for number, iterate in iterates.items():
        record = Experience.load(live.records / f"{number:06d}")
        assert (record.step, record.samples) == (4 * number, 18 * number)
        group = record.groups[0]
        np.testing.assert_allclose(
            group.responses[0].sampled_logps,
            dense_logps(iterate, group.prompt_ids, group.responses[0].ids),
            rtol=0,
            atol=2e-4,
        )
        # the last two steps are one pass of one part: what no step would learn from is not drawn
        assert len(record.groups) == (6 if number < 2 else 3)
    assert len({json.dumps(batches) for batches in seen}) == 9  # only the last record's two passes are of one part
    with pytest.raises(IndexError):
        live.window(10, micro_batch_tokens=100)


def test_every_pass_learns_from_every_prompt(rollouts):
    live = rollouts(steps=3, epochs=2, prompts=2)
    passes = [[live.window(3 * epoch + part, micro_batch_tokens=1000) for part in range(3)] for epoch in range(2)]
    record = Experience.load(live.records / "000000")
    everyone = sorted(token for group in record.groups for response in group.responses for token in response.ids)
    for windows in passes:
        batches = [batch for window in windows for batch in window.mine]
        learnt = [token for batch in batches for token in batch.target_ids[batch.target_mask].tolist()]
        assert sorted(learnt) == everyone
        assert [window.samples for window in windows] == [2, 2, 2]


def test_prompts_take_turns_by_weight_and_those_that_are_too_long_are_left_out(rollouts):
    live = rollouts()
    assert live.dropped == {"fox": 1, "dog": 0}
    asked = []
    for step in range(3):
        window = live.window(step, micro_batch_tokens=1000)
        record = Experience.load(live.records / f"{step:06d}")
        sources = [group.question["source"] for group in record.groups]
        assert (sources.count("fox"), sources.count("dog")) == (4, 2)
        tokens = {
            name: sum(group.length for group in record.groups if group.question["source"] == name)
            for name in ("fox", "dog")
        }
        assert window.consumed == tokens
        asked += [tuple(group.prompt_ids) for group in record.groups if group.question["source"] == "fox"]
    assert len(set(asked[:8])) == 8
    assert set(asked[:9]) == set(asked)  # nine are there: the tenth that is asked was the first
    total = sum(live.ledger(3).values())
    assert total == sum(live.ledger(2).values()) + sum(window.consumed.values())
    assert live.ledger(0) == {"fox": 0, "dog": 0}


def test_a_later_round_goes_on_where_the_one_before_has_ended(rollouts):
    """Two rounds of four steps ask the prompts, with the random numbers, that one stage of eight asks."""

    def asked(records, steps, **named):
        live = rollouts(records=records, steps_in_all=steps, steps=2, prompts=1, **named)
        for step in range(steps):
            live.window(step, micro_batch_tokens=1000)
        return [Experience.load(path) for path in sorted((live.records).iterdir())]

    together = asked("together", 8)
    first, second = asked("first", 4), asked("second", 4, round=1)
    assert [record.samples for record in together] == [record.samples for record in (*first, *second)]
    for one, other in zip(together, (*first, *second), strict=True):
        for group, same in zip(one.groups, other.groups, strict=True):
            assert group.prompt_ids == same.prompt_ids
            assert [response.ids for response in group.responses] == [response.ids for response in same.responses]
    prompts = [
        {tuple(group.prompt_ids) for record in records for group in record.groups} for records in (first, second)
    ]
    assert not prompts[0] & prompts[1]


def test_ranks_draw_shares_of_the_same_record(rollouts, monkeypatch):
    """Two ranks in turn, each given what the other has drawn, against one alone."""
    alone = rollouts(records="alone").window(0, micro_batch_tokens=80)
    shares = {}
    monkeypatch.setattr(
        "lightning_llm.training.rollout._gathered", lambda own, ranks: shares.setdefault(len(shares), own) and []
    )
    for rank in range(2):
        rollouts(records=f"share{rank}").window(0, rank=rank, world_size=2, micro_batch_tokens=80)
    assert [len(share) for share in shares.values()] == [3, 3]
    monkeypatch.setattr("lightning_llm.training.rollout._gathered", lambda own, ranks: list(shares.values()))
    windows = [
        rollouts(records=f"both{rank}").window(0, rank=rank, world_size=2, micro_batch_tokens=80) for rank in range(2)
    ]
    assert len(windows[0].mine) == len(windows[1].mine)
    for window in windows:
        assert (window.responses, window.target_tokens) == (alone.responses, alone.target_tokens)
        assert window.consumed == alone.consumed
    together = [tokens for window in windows for batch in window.mine for tokens in batch.input_ids.tolist()]
    assert sorted(together) == sorted(token for batch in alone.mine for token in batch.input_ids.tolist())


def test_ties_are_left_out_of_pairs_and_counted(rollouts, monkeypatch):
    monkeypatch.setattr(Actor, "_response", lambda self, drawn: Response(drawn.ids, "said", True))
    live = rollouts(as_pairs=True, prompts=4)
    scores = iter([1.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    original = live.actor.judge

    def judge(questions, responses):
        verdicts = original(questions, responses)
        return [type(verdict)(next(scores), {"part": 1.0}) for verdict in verdicts]

    live.actor.judge = judge
    window = live.window(0, micro_batch_tokens=1000)
    assert (window.pairs, window.responses, window.samples) == (2, 4, 4)
    assert window.figures["reward/ties"] == (2, 4)
    assert window.figures["reward/mean"] == (6.5, 12)
    assert window.figures["reward/parts/part"] == (12.0, 12)
    [batch] = window.mine
    chosen, rejected = batch.pairs(batch.columns["rewards"])
    assert sorted(zip(chosen.tolist(), rejected.tolist(), strict=True)) == [(1.0, 0.0), (2.0, 0.0)]
    assert sum(window.consumed.values()) == batch.num_tokens


def test_figures_are_sums_over_responses(rollouts):
    live = rollouts()
    window = live.window(0, micro_batch_tokens=1000)
    responses = [r for group in Experience.load(live.records / "000000").groups for r in group.responses]
    means = {name: total / count for name, (total, count) in window.figures.items()}
    lengths = [len(response.ids) for response in responses]
    assert means["responses/length"] == pytest.approx(np.mean(lengths))
    assert means["responses/complete"] == pytest.approx(np.mean([response.is_complete for response in responses]))
    assert means["reward/mean"] == pytest.approx(np.mean([response.reward for response in responses]))
    assert means["kl/reference"] == pytest.approx(0.0, abs=1e-4)  # the policy is the reference yet
    assert means["entropy"] == pytest.approx(-sum(r.sampled_logps.sum() for r in responses) / sum(lengths), rel=1e-5)
    gaps = np.concatenate([np.abs(r.sampler_logps - r.sampled_logps) for r in responses])
    assert means["logps/gap"] == pytest.approx(gaps.mean())
    assert means["logps/gap_max"] == pytest.approx(gaps.max())
    assert 0 < gaps.max() < 1e-4
    hot = figures(Experience.load(live.records / "000000").groups, SamplingConfig(temperature=1.5))
    assert not {"logps/gap", "logps/gap_max"} & set(hot)  # the two are to differ


def test_held_out_rewards_are_of_the_same_prompts_and_random_numbers(rollouts, policy):
    live = rollouts()
    first = live.validate(None, 0, 1).means()
    live.window(0, micro_batch_tokens=1000)
    assert live.validate(None, 0, 1).means() == first
    assert set(first) == {"validation/reward/mean", "validation/responses/length", "validation/responses/complete"}
    parts = [live.validate(None, rank, 2) for rank in range(2)]
    parts[0].merge(parts[1])
    assert parts[0].means() == pytest.approx(first)
    moved(policy, by=0.5)
    assert live.validate(None, 0, 1).means() != first


def test_a_record_that_is_there_is_not_drawn_again(rollouts, policy):
    live = rollouts()
    before = live.window(0, micro_batch_tokens=1000)
    moved(policy, by=0.5)
    again = rollouts().window(0, micro_batch_tokens=1000)
    assert again.flops == 0
    for one, two in zip(before.mine, again.mine, strict=True):
        assert torch.equal(one.input_ids, two.input_ids)
        assert all(torch.equal(column, two.columns[name]) for name, column in one.columns.items())


def test_an_average_follows_the_policy_once_for_every_step(policy):
    reference, fixed = Reference(policy, 0.9), Reference(policy, None)
    expected = {name: parameter.detach().double().clone() for name, parameter in policy.named_parameters()}
    first = {name: parameter.clone() for name, parameter in fixed.model.named_parameters()}
    for step in range(4):
        for _ in range(2):  # asked twice between two steps
            reference.follow(policy, step)
            fixed.follow(policy, step)
        if step:
            expected = {name: 0.9 * expected[name] + 0.1 * p.detach().double() for name, p in policy.named_parameters()}
        for name, parameter in reference.model.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=1e-6)
            assert not parameter.requires_grad
        moved(policy, step)
    for name, parameter in fixed.model.named_parameters():
        assert torch.equal(parameter, first[name])


def test_prompts_without_room_for_a_response_are_refused(rollouts):
    with pytest.raises(UserError, match="hold no prompt that can be asked"):
        rollouts(data=DataConfig("none", "prompts", {"fox": SourceConfig(weight=0.0), "dog": SourceConfig(weight=0.0)}))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"per_prompt": 0}, "per_prompt must be a number of at least 1"),
        ({"sampling": SamplingConfig(temperature=0.0)}, "would be the same"),
        ({"reference": "moving"}, "reference is fixed or ema"),
        ({"ema_decay": 1.0}, "ema_decay lies in"),
        ({"steps": 4, "epochs": 4}, "up to 15 steps old"),
        ({"prompts": 0}, "prompts must be a number of at least 1"),
        ({"round": -1}, "round must be a number of at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        RolloutConfig(**wrong)
