"""Judges that score: reward models alone and together, length, a mix, and the controls."""

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.evaluation.config import (
    ExactAnswerConfig,
    LengthConfig,
    RandomConfig,
    RewardModelJudgeConfig,
    SubstringConfig,
    WeightedConfig,
    WeightedPart,
)
from lightning_llm.evaluation.judges import JudgeContext, Question, Response, Verdict
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.reward import RewardModel
from lightning_llm.settings import UserError

QUESTIONS = [Question("sum", "sum 3 4", [1, 2, 3], "7")] * 3 + [Question("sum", "sum 1 1", [4, 5], "2")] * 2
RESPONSES = [
    Response([6, 9], "answer: 7", True),
    Response([6, 7, 8, 9], "3 7 answer: 8", True),
    Response([6, 6, 6, 6, 6, 6], "1 2 3 4 5 6 7 8 9", False),
    Response([8], "", False),
    Response([7, 9], "answer: 2", True),
]
HERE = JudgeContext()


def scores(verdicts):
    return [verdict.score for verdict in verdicts]


@pytest.fixture
def reward_models(tmp_path):
    sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    config = ModelConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    folders = []
    for seed in (1, 2):
        backbone = Transformer(config)
        backbone.reset_parameters(seed)
        folders.append(tmp_path / str(seed))
        RewardModel.from_backbone(backbone, seed).save_pretrained(folders[-1])
    return folders


@pytest.mark.parametrize("max_tokens", [1, 8, 1000])
def test_a_reward_model_scores_each_response_as_if_it_stood_alone(max_tokens, reward_models):
    model = RewardModel.from_pretrained(reward_models[0])
    alone = SegmentBatch.from_documents([q.prompt_ids + r.ids for q, r in zip(QUESTIONS, RESPONSES, strict=True)])
    judge = RewardModelJudgeConfig().build(JudgeContext(reward_models[:1], max_tokens=max_tokens))
    found = judge(QUESTIONS, RESPONSES)
    torch.testing.assert_close(torch.tensor(scores(found)), model.scores(alone).detach(), rtol=1e-5, atol=1e-5)
    assert found[0].parts == {}
    assert judge([], []) == []


@pytest.mark.parametrize("ensemble", ["mean", "min"])
def test_several_reward_models_together(ensemble, reward_models):
    single = [
        scores(RewardModelJudgeConfig().build(JudgeContext([path]))(QUESTIONS, RESPONSES)) for path in reward_models
    ]
    found = RewardModelJudgeConfig(ensemble=ensemble).build(JudgeContext(reward_models))(QUESTIONS, RESPONSES)
    join = min if ensemble == "min" else lambda pair: sum(pair) / 2
    assert scores(found) == pytest.approx([join(pair) for pair in zip(*single, strict=True)], abs=1e-6)
    assert found[1].parts == pytest.approx({"reward_model.0": single[0][1], "reward_model.1": single[1][1]}, abs=1e-6)


def test_a_reward_model_that_is_not_there():
    with pytest.raises(UserError, match="Name a stage or a directory in judged_by"):
        RewardModelJudgeConfig().build(HERE)
    with pytest.raises(ValueError, match="mean or min"):
        RewardModelJudgeConfig(ensemble="max")


def test_length_costs_what_it_is_said_to():
    judge = LengthConfig(free=2, per_token=0.5, cut_off=1.0).build(HERE)
    assert scores(judge(QUESTIONS, RESPONSES)) == [0, -1, -3, -1, 0]


def test_the_substring_reward_is_hacked_by_saying_everything():
    """Mean reward rises, exact match falls: the two have to be looked at together."""
    substring, exact = SubstringConfig().build(HERE), ExactAnswerConfig().build(HERE)
    questions = [Question("sum", f"sum {a} {b}", [1], str(a + b)) for a in range(5) for b in range(4)]
    sums = [int(question.answer) for question in questions]
    honest = [Response([1], f"answer: {total}" if total % 2 else "answer: 99", True) for total in sums]
    hacked = [Response([1], " ".join(map(str, range(10))), True)] * len(questions)

    def mean(judge, responses):
        return sum(scores(judge(questions, responses))) / len(questions)

    assert mean(substring, hacked) == 1 > mean(substring, honest) > 0
    assert mean(exact, honest) > 0 == mean(exact, hacked)


def test_the_substring_of_an_unknown_answer_is_refused():
    """The empty text stands in every other: all responses would be worth 1."""
    questions = [*QUESTIONS[:1], Question("prompts", "say something", [1], "")]
    with pytest.raises(UserError, match="substring: compares with the answer, and none is known to 'say something'"):
        SubstringConfig().build(HERE)(questions, RESPONSES[:2])


def test_the_random_control_knows_nothing_and_says_the_same_again():
    judge = RandomConfig().build(JudgeContext(seed=3))
    questions = [Question("sum", f"q {number}", [number], "7") for number in range(400)]
    responses = [Response([1], "answer: 7", True)] * 400
    first = scores(judge(questions, responses))
    assert first == scores(judge(questions[::-1], responses))[::-1]
    assert 0.4 < sum(first) / 400 < 0.6
    assert first != scores(RandomConfig().build(JudgeContext(seed=4))(questions, responses))


def test_a_mix_adds_weighted_parts_and_keeps_them():
    parts = {
        "correct": WeightedPart(2.0, ExactAnswerConfig()),
        "short": WeightedPart(0.1, LengthConfig(per_token=1.0)),
        "watched": WeightedPart(0.0, SubstringConfig()),
    }
    found = WeightedConfig(parts=parts).build(HERE)(QUESTIONS[:3], RESPONSES[:3])
    assert scores(found) == pytest.approx([2 - 0.2, -0.4, -0.6])
    assert found[1] == Verdict(pytest.approx(-0.4), {"correct": 0.0, "short": -4.0, "watched": 1.0})
    with pytest.raises(UserError, match=r"judge\.parts: is empty"):
        WeightedConfig().build(HERE)
    assert not WeightedConfig(parts=parts).needs_reward_model
    assert WeightedConfig(parts={**parts, "rm": WeightedPart(1.0, RewardModelJudgeConfig())}).needs_reward_model
