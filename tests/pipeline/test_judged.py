"""Stages that sample, judge and select: what is wrong with them is told when a recipe is composed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lightning_llm
from lightning_llm import compose, plan
from lightning_llm.settings import UserError

ROUND = "stages.itec.stages"
SCORE = "judge@stages.score.judge"
RANKED = [f"{SCORE}=reward_model", "stages.score.judged_by=[reward_model]"]
MIXED = [f"{SCORE}=weighted", f"{SCORE}.parts.form.judge=reward_model", "stages.score.judged_by=[reward_model]"]
IN_ROUNDS = [f"judge@{ROUND}.score.judge=reward_model", f"{ROUND}.score.judged_by=[reward_model]"]
NO_MINIMUM = [f"{ROUND}.best.minimum_score=null", f"{ROUND}.pairs.minimum_score=null"]
WRONG = {  # recipe, overrides, what is said
    "a reward model is asked, and there is none": (
        "rejection_sampling",
        [f"{SCORE}=reward_model"],
        "stages.score.judged_by: names nobody, and the judge asks a reward model",
    ),
    "a part of a mixture asks one": (
        "rejection_sampling",
        [f"{SCORE}=weighted", f"{SCORE}.parts.form.judge=reward_model"],
        "stages.score.judged_by: names nobody, and the judge asks a reward model",
    ),
    "in rounds": (
        "itec",
        [f"judge@{ROUND}.score.judge=reward_model"],
        f"{ROUND}.score.judged_by: names nobody, and the judge asks a reward model",
    ),
    "a reward model that nobody asks": (
        "qwen2",
        ["judge@stages.online_dpo.judge=exact_answer"],
        "stages.online_dpo.judged_by: is given, and exact_answer asks no reward model. "
        "Take it away (stages.online_dpo.judged_by=[])",
    ),
    "a reward model that no stage of kind judge asks": (
        "qwen2",
        [
            *("+stage@stages.sample=sample", "stages.sample.models=[sft]", "+stage@stages.score=score"),
            *("stages.score.data=[sample]", "stages.score.judged_by=[reward_model]"),
        ],
        "stages.score.judged_by: is given, and exact_answer asks no reward model",
    ),
    "a reward model that is misspelt, among those there are": (
        "qwen2",
        ["stages.online_dpo.judged_by=[rward_model]"],
        "rward_model is neither a stage nor a folder with a model. The nearest is reward_model (known: reward_model)",
    ),
    "settings of a stage that is left out": (
        "rejection_sampling",
        ["stages.reward_model.lr.peak=1e-4"],
        "stages.reward_model.lr.peak: is given, and reward_model is left out: no stage is made from it",
    ),
    "a misspelt name of what is left out": (
        "rejection_sampling",
        [f"{SCORE}=reward_model", "stages.score.judged_by=[rewardmodel]"],
        "stages.score.judged_by: rewardmodel is neither a stage nor a folder with a model. The nearest is reward_model",
    ),
    "an optional stage, once more": (
        "rejection_sampling",
        ["+stage@stages.reward_model=reward_model"],
        "stages.reward_model is there already. Leave +stage@stages.reward_model out",
    ),
    "a kind of a stage that the recipe leaves out": (
        "rejection_sampling",
        ["stage@stages.online_dpo=online_dpo"],
        "stages.online_dpo is null in conf/recipe/rejection_sampling.yaml",
    ),
    "the best of what nobody has judged": (
        "rejection_sampling",
        ["stages.best.data=[sample]"],
        "stages.best.rule: is best, and nobody has judged what sample has sampled",
    ),
    "a balance of what nobody has judged": (
        "rejection_sampling",
        [
            "stages.best.data=[sample]",
            "stages.best.rule=first",
            "stages.best.balance=difficulty",
            "stages.best.keep=0.5",
        ],
        "stages.best.balance: is by difficulty, and nobody has judged what sample has sampled",
    ),
    "a minimum of what is known up to a constant": (
        "rejection_sampling",
        RANKED,
        "stages.best.minimum_score: is 0.5, and score asks a reward model, whose scores are known up to a constant of "
        "the prompt. Set stages.best.minimum_score=null, or let a verifier judge",
    ),
    "a minimum of a mixture with a part of that kind": (
        "rejection_sampling",
        MIXED,
        "stages.best.minimum_score: is 0.5, and score asks a reward model",
    ),
    "a threshold of such a score": (
        "rejection_sampling",
        [*RANKED, "stages.best.rule=threshold", "stages.best.minimum_score=null"],
        "stages.best.rule: is threshold, and score asks a reward model, whose scores are known up to a constant of the "
        "prompt. Set stages.best.rule=best and stages.best.minimum_score=null",
    ),
    "a minimum of such a score for pairs, in rounds": (
        "itec",
        [*IN_ROUNDS, f"{ROUND}.best.minimum_score=null", f"{ROUND}.best.balance=none"],
        f"{ROUND}.pairs.minimum_score: is 0.5, and itec1.score asks a reward model",
    ),
    "a balance by how many are right, of which no such score tells": (
        "itec",
        [*IN_ROUNDS, *NO_MINIMUM],
        f"{ROUND}.best.balance: is by difficulty, the share of right responses, and itec1.score asks a reward model, "
        "whose scores are known up to a constant of the prompt. "
        f"Set {ROUND}.best.balance=none (and {ROUND}.best.keep=1",
    ),
    "a balance by what chance calls right": (
        "rejection_sampling",
        [f"{SCORE}=random", "stages.best.balance=difficulty", "stages.best.keep=0.5"],
        "stages.best.balance: is by difficulty, the share of right responses, and score asks a judge (random) that "
        "only ranks responses. Set stages.best.balance=none",
    ),
    "responses that would all be one": (
        "rejection_sampling",
        ["stages.sample.sampling.top_k=1"],
        "stages.sample.sampling.top_k: is 1: all responses of a model to a prompt would be the same",
    ),
    "pairs for a stage that learns from conversations": (
        "rejection_sampling",
        ["stages.best.form=pairs"],
        "stages.rejection.data.sources.best.path: best leaves pairs, and rejection reads conversations. "
        "Set stages.best.form=conversations",
    ),
    "conversations for one that learns from pairs": (
        "itec",
        [f"{ROUND}.pairs.form=conversations"],
        f"{ROUND}.preferred.data.sources.pairs.path: itec1.pairs leaves conversations, and itec1.preferred reads "
        f"pairs. Set {ROUND}.pairs.form=pairs",
    ),
    "many responses, all the same": (
        "rejection_sampling",
        ["stages.sample.sampling.temperature=0"],
        "stages.sample.sampling.temperature: is 0: all responses of a model to a prompt would be the same",
    ),
    "a number out of range, with what the setting takes": (
        "rejection_sampling",
        ["stages.sample.sampling.top_p=2"],
        "stages.sample.sampling.top_p: must lie in (0, 1], is 2.0. Give it another value (number, default 1.0)",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_told_at_once(case):
    recipe, words, said = case
    with pytest.raises(UserError, match=re.escape(said)):
        compose(recipe, overrides=words)


ROUNDS = "stages.warp.stages"
ASKED = {  # recipe -> stages that judge, as they are typed, the first of them in the plan, and what else is typed
    "rejection_sampling": (["stages.score"], "score", ["stages.best.minimum_score=null"]),
    "policy_gradients": (["stages.rlhf"], "rlhf", []),
    "warp": ([f"{ROUNDS}.one", f"{ROUNDS}.two"], "warp1.one", []),
    "itec": ([f"{ROUND}.score"], "itec1.score", [*NO_MINIMUM, f"{ROUND}.best.balance=none", f"{ROUND}.best.keep=1"]),
}


@pytest.mark.parametrize("recipe", ASKED)
def test_a_reward_model_comes_in_where_it_is_named(recipe):
    typed, judge, more = ASKED[recipe]
    words = [word for key in typed for word in (f"judge@{key}.judge=reward_model", f"{key}.judged_by=[reward_model]")]
    words += more
    plain, asked = ({node.name: node for node in plan(compose(recipe, overrides=more)).nodes} for more in ([], words))
    assert asked.keys() - plain.keys() == {"reward_model", "reward_model.prepare", "reward_model.evaluate"}
    assert asked[judge].inputs["reward_model.0"] == "reward_model"
    order = list(asked)
    assert order.index("sft") < order.index("reward_model") < order.index(judge)
    assert asked["sft"] == plain["sft"]  # what others are does not change


@pytest.mark.parametrize("recipe", ["rejection_sampling", "itec"])
def test_the_words_of_a_reward_model_stand_in_the_recipes_header(recipe):
    typed, _, more = ASKED[recipe]
    header = (Path(lightning_llm.__file__).parents[1] / "conf" / "recipe" / f"{recipe}.yaml").read_text("utf-8")
    header = header.partition("defaults:")[0].replace("\n# ", " ")
    for word in [f"judge@{typed[0]}.judge=reward_model", f"{typed[0]}.judged_by=[reward_model]", *more]:
        assert f" {word}" in header


@pytest.mark.parametrize("words", [RANKED, MIXED, [f"{SCORE}=random"], [f"{SCORE}=length"]])
def test_no_score_of_what_only_ranks_is_right(words):
    def settings(*more):
        nodes = plan(compose("rejection_sampling", overrides=["stages.best.minimum_score=null", *more])).nodes
        return next(node.settings for node in nodes if node.name == "best")

    assert settings(*words).right_from is None
    assert settings().right_from == 0.5


def test_an_optional_stage_may_be_asked_for_by_itself():
    assert "reward_model" in compose("rejection_sampling", overrides=["stages.reward_model.optional=false"]).stages
    assert "online_dpo" not in compose("qwen2", overrides=["stages.online_dpo.optional=true"]).stages


@pytest.mark.parametrize(
    "words",
    [
        ["stages.best.data=[sample]", "stages.best.rule=first", "stages.best.minimum_score=null"],
        ["stages.sample.sampling.temperature=0", "stages.sample.per_prompt=1"],
        [f"{SCORE}=weighted"],
    ],
)
def test_what_is_right_is_not_refused(words):
    assert compose("rejection_sampling", overrides=words).stages["best"].kind == "select"
