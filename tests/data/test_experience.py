"""A record of experience: the same after it was saved, and batches that say what it says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_llm.data.experience import COLUMNS, TOKEN_LOGPS, Drawn, Experience, Group, build_batch

CHANCE = np.random.default_rng(0)


def drawn(length, reward, text="naïve 你好", is_complete=True):
    logps = {name: -CHANCE.random(length).astype(np.float32) for name in TOKEN_LOGPS}
    return Drawn(CHANCE.integers(0, 90, length).tolist(), text, is_complete, reward, {"form": reward / 3}, **logps)


def group(rewards, prompt=3):
    responses = [drawn(int(CHANCE.integers(1, 7)), reward, is_complete=reward != 0) for reward in rewards]
    return Group({"source": "a", "answer": "7"}, CHANCE.integers(0, 90, prompt).tolist(), responses)


GROUPS = [group([0.1, 1 / 3, -2.0]), group([0.5, 0.5, 0.5], prompt=1), group([1.0, 0.0, 1.0], prompt=5)]


def test_what_was_saved_comes_back_to_the_bit(tmp_path):
    record = Experience(number=3, step=12, samples=36, groups=GROUPS)
    record.save(tmp_path / "000003")
    assert [path.name for path in tmp_path.iterdir()] == ["000003"]  # nothing half-written is left
    again = Experience.load(tmp_path / "000003")
    assert (again.number, again.step, again.samples) == (3, 12, 36)
    assert [one.question for one in again.groups] == [one.question for one in GROUPS]
    for one, two in zip(GROUPS, again.groups, strict=True):
        for mine, other in zip(one.responses, two.responses, strict=True):
            assert (mine.text, mine.is_complete, mine.parts) == (other.text, other.is_complete, other.parts)
            assert np.array_equal(mine.sampler_logps, other.sampler_logps)
    before, after = build_batch(GROUPS), build_batch(again.groups)
    assert before.lengths == after.lengths
    assert torch.equal(before.input_ids, after.input_ids)
    for name in (*COLUMNS, "rewards"):
        assert torch.equal(before.columns[name], after.columns[name]), name


def test_an_interrupted_save_leaves_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_llm.data.experience.save_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        Experience(0, 0, 0, GROUPS).save(tmp_path / "000000")
    assert not (tmp_path / "000000").exists()
    monkeypatch.undo()
    Experience(0, 0, 0, GROUPS).save(tmp_path / "000000")  # and the half of it is no obstacle
    assert len(Experience.load(tmp_path / "000000").groups) == 3


def test_batches_have_what_was_recorded_of_each_token_and_response():
    batch = build_batch(GROUPS)
    assert batch.lengths == [n for one in GROUPS for n, _ in one.segments]
    assert batch.num_tokens == sum(one.length for one in GROUPS)
    responses = [response for one in GROUPS for response in one.responses]
    assert batch.target_ids[batch.target_mask].tolist() == [token for each in responses for token in each.ids]
    for name in COLUMNS:
        expected = np.concatenate([getattr(response, name) for response in responses])
        assert batch.columns[name][batch.target_mask].numpy().tolist() == expected.tolist()
        assert not batch.columns[name][~batch.target_mask].any()
    rewards = batch.groups(batch.columns["rewards"], 3)
    assert rewards.tolist() == torch.tensor([[each.reward for each in one.responses] for one in GROUPS]).tolist()


def test_a_pair_is_the_best_against_the_worst_and_ties_are_none():
    pairs = [one.pair() for one in GROUPS]
    assert pairs[1] is None
    assert [response.reward for response in pairs[0].responses] == [1 / 3, -2.0]
    assert pairs[2].responses == GROUPS[2].responses[:2]  # of equals the first
    assert pairs[2].prompt_ids == GROUPS[2].prompt_ids
    batch = build_batch([pairs[0], pairs[2]])
    chosen, rejected = batch.pairs(batch.columns["rewards"])
    assert (chosen > rejected).all()


def test_what_was_cut_off_is_never_chosen_and_may_be_rejected():
    """As in a selection of samples: the same rule, and the same function."""
    whole, cut = GROUPS[0].responses[0], replace(GROUPS[0].responses[0], is_complete=False)
    best_is_cut = Group({}, [1], [replace(cut, reward=2.0), replace(whole, reward=1.0), replace(whole, reward=0.0)])
    assert [response.reward for response in best_is_cut.pair().responses] == [1.0, 0.0]
    worst_is_cut = Group({}, [1], [replace(whole, reward=1.0), replace(cut, reward=0.0)])
    assert [response.is_complete for response in worst_is_cut.pair().responses] == [True, False]
    nothing_better = Group({}, [1], [replace(cut, reward=1.0), replace(whole, reward=0.0)])
    assert nothing_better.pair() is None
    assert not nothing_better.is_tied
    assert GROUPS[1].is_tied


def test_nothing_makes_a_batch_in_which_nothing_counts():
    batch = build_batch([])
    assert sum(batch.target_counts) == 0
    assert batch.groups(batch.columns["rewards"]).shape == (0, 1)
    assert {name: len(batch.columns[name]) for name in COLUMNS} == dict.fromkeys(COLUMNS, len(batch.target_ids))
