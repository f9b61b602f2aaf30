"""What a scale keeps of a recipe, as properties over any recipe and any scale."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm import compose, plan
from lightning_llm.data.config import DataConfig, SourceConfig, TokenizerConfig
from lightning_llm.evaluation.config import EvaluationConfig
from lightning_llm.models.config import ModelConfig
from lightning_llm.objectives.config import CausalLMConfig, DPOConfig
from lightning_llm.optimization.config import LearningRateConfig
from lightning_llm.pipeline.config import EvaluationScale, GenerationScale, PhaseScale, ScaleConfig
from lightning_llm.pipeline.expand import expand
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.pipeline.scaling import scaled
from lightning_llm.schedules import BatchPlan, as_ramp, ramp_value
from lightning_llm.settings import UserError
from lightning_llm.stages.config import ComputeConfig, GenerateStage, SelectStage, TrainStage

TEXT = DataConfig(name="text", sources={"web": SourceConfig(weight=0.7), "other": SourceConfig(weight=0.3)})
CHAT = DataConfig(name="chat", form="conversations", sources={"chats": SourceConfig()})
QUESTIONS = DataConfig(name="questions", form="questions", sources={"asked": SourceConfig(path="asked.jsonl")})
PAIRS = DataConfig(name="pairs", form="pairs", sources={"pairs": SourceConfig()})
CORPORA = {name: SourceConfig(path=f"{name}.jsonl") for name in ("web", "chats", "pairs")} | {"other": SourceConfig()}
NANO = ScaleConfig(
    name="nano",
    shapes={"policy": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}},
    vocabulary=500,
    context=128,
    pretraining_tokens=1e6,
    minimum_share=0.2,
    minimum_steps=30,
    phases={
        "pretrain": PhaseScale(batch_tokens=2048, lr_factor=10),
        "sft": PhaseScale(examples=1000, tokens_per_example=50, batch_tokens=1024, lr_factor=100),
        "preference": PhaseScale(examples=300, tokens_per_example=80, batch_tokens=512, lr_factor=50),
    },
    corpora=CORPORA,
    evaluation=EvaluationScale(questions=7),
)
PAPER = ScaleConfig(
    name="paper",
    phases={"sft": PhaseScale(tokens_per_example=900), "preference": PhaseScale(tokens_per_example=900)},
    corpora=CORPORA,
)


def train(**settings) -> TrainStage:
    common = {"context": 4096, "batch_tokens": 4e6, "data": TEXT, "objective": CausalLMConfig()}
    return TrainStage(**common | settings)


def recipe(tokens=(7e12, 0.5e12), contexts=(4096, 32_768), lr=None, **more) -> Recipe:
    stages = {
        "first": train(tokens=tokens[0], context=contexts[0], lr=lr or LearningRateConfig(peak=3e-4)),
        "second": train(tokens=tokens[1], context=contexts[1], starts_from="first", batch_tokens=8e6),
        "sft": train(
            phase="sft", examples=5e5, epochs=2, context=contexts[1], batch_tokens=1e6, data=CHAT, starts_from="second"
        ),
        "dpo": train(
            phase="preference", examples=6e4, batch_tokens=1e5, data=PAIRS, objective=DPOConfig(), starts_from="sft"
        ),
    }
    stages["sft"].lr = LearningRateConfig(schedule="linear", peak=7e-6, final=7e-7, warmup_steps=10)
    evaluation = EvaluationConfig(text=TEXT, tasks=DataConfig(name="none"), pairs=PAIRS)
    named = ModelConfig(name="model", attention_bias=True, tie_word_embeddings=True)
    return Recipe("made", named, TokenizerConfig(), stages, evaluation, PAPER, ComputeConfig(), **more)


lengths = st.floats(1e9, 2e13)


@given(first=lengths, second=lengths)
def test_shares_of_pre_training_are_kept(first, second):
    stages = scaled(recipe(tokens=(first, second)), replace(NANO, minimum_steps=1)).stages
    share = stages["second"].tokens / (stages["first"].tokens + stages["second"].tokens)
    expected = max(second / (first + second), 0.2)
    if expected < 0.99:  # beyond it the floor of one optimizer step shows
        assert share == pytest.approx(expected, rel=0.01)
        assert stages["first"].tokens + stages["second"].tokens == pytest.approx(1e6, rel=0.01)


@given(first=st.sampled_from([2048, 4096, 8192]), multiple=st.sampled_from([1, 2, 8, 32]))
def test_multiples_of_the_context_are_kept(first, multiple):
    stages = scaled(recipe(contexts=(first, first * multiple)), NANO).stages
    assert stages["first"].context == 128
    assert stages["second"].context == stages["sft"].context == 128 * multiple


def test_what_is_sampled_is_what_the_scale_can_afford():
    sample = GenerateStage(models=["sft"], prompts=9e5, per_prompt=10, max_new_tokens=2048, data=QUESTIONS)
    best = SelectStage(data=["sample"], rule="first", keep=0.5)
    learnt = DataConfig(
        name="learnt",
        form="conversations",
        sources={"best": SourceConfig(path="stage:best", weight=0.8), "mine": SourceConfig(path="x.jsonl", weight=0.2)},
    )
    again = train(phase="sft", examples=5e5, data=learnt, starts_from="sft", batch_tokens=1e6)
    whole = recipe()
    whole = replace(whole, stages=whole.stages | {"sample": sample, "best": best, "again": again})
    small = replace(NANO, generation=GenerationScale(prompts=400, max_new_tokens=40, tokens_per_prompt=9))
    stages = scaled(whole, small).stages
    found = stages["sample"]
    assert (found.prompts, found.per_prompt, found.max_new_tokens) == (400, 10, 40)
    assert found.data.tokens_per_example == 9
    assert stages["best"] == best
    rows = 400 * 0.5 / 0.8  # until each row that is kept has been seen once, of four fifths of the tokens
    assert stages["again"].examples == math.ceil(rows * 30 * 1024 / (rows * 50))  # lengthened to the floor of 30 steps
    shorter = replace(small, minimum_steps=1)
    assert scaled(whole, shorter).stages["again"].examples == rows
    pinned = replace(whole, pinned=frozenset({"stages.sample.prompts", "stages.again.examples"}))
    assert scaled(pinned, small).stages["sample"].prompts == 9e5
    assert scaled(pinned, small).stages["again"].examples == 5e5
    as_published = scaled(whole, PAPER).stages
    assert (as_published["sample"].prompts, as_published["again"].examples) == (9e5, 5e5)


@given(
    peak=st.floats(1e-6, 1e-2),
    ratio=st.floats(0.0, 1.0),
    share=st.floats(0.001, 0.3),
    schedule=st.sampled_from(["cosine", "linear", "wsd"]),
)
def test_a_learning_rate_keeps_its_shape(peak, ratio, share, schedule):
    lr = LearningRateConfig(schedule=schedule, peak=peak, final=peak * ratio, warmup_share=share)
    small = scaled(recipe(lr=lr or LearningRateConfig(peak=3e-4)), NANO).stages["first"].lr
    assert small.peak == pytest.approx(10 * peak)
    assert small.final == pytest.approx(small.peak * ratio)
    assert (small.schedule, small.warmup_share) == (schedule, share)


def test_a_warm_up_in_steps_keeps_its_share():
    """10 of the report's 900 steps; at nano of what there is."""
    stage = next(node for node in expand(scaled(recipe(), NANO)) if node.name == "sft").settings
    assert stage.lr.warmup_steps is None
    assert 0 < stage.lr.warmup_tokens < stage.tokens


@given(
    budget=st.floats(1e4, 1e7),
    batch=st.integers(100, 10_000),
    steps=st.integers(1, 100),
    second=st.floats(1e6, 7e12),
    ramp_at=st.floats(0.001, 0.9),
)
def test_every_stage_and_segment_has_its_steps(budget, batch, steps, second, ramp_at):
    made = recipe(tokens=(7e12, second))
    ramp = [{"at": 0, "value": 4e6}, {"at": 7e12 * ramp_at, "value": 8e6}]
    made.stages["first"].batch_tokens = ramp
    made.stages["first"].context = [{"at": 0, "value": 4096}, {"at": 7e12 * ramp_at / 2, "value": 8192}]
    phases = NANO.phases | {"pretrain": PhaseScale(batch_tokens=batch)}
    scale = replace(NANO, pretraining_tokens=budget, minimum_steps=steps, phases=phases)
    for node in expand(scaled(made, scale)):
        if node.kind != "train":
            continue
        settings = node.settings
        plan = BatchPlan(settings.batch_tokens, settings.tokens)
        assert plan.steps >= steps
        for pieces in (settings.batch_tokens, settings.context):
            ends = [entry["at"] for entry in pieces[1:]] + [settings.tokens]
            for entry, end in zip(pieces, ends, strict=True):
                size = ramp_value(settings.batch_tokens, entry["at"])
                assert end - entry["at"] >= (steps - 1) * size


def test_ratios_of_batches_and_ramps_are_kept():
    made = recipe()
    made.stages["first"].batch_tokens = [{"at": 0, "value": 4e6}, {"at": 1.4e12, "value": 16e6}]
    stages = scaled(made, NANO).stages
    first = as_ramp(stages["first"].batch_tokens)
    assert [entry["value"] for entry in first] == [2048, 8192]
    assert first[1]["at"] == pytest.approx(0.2 * stages["first"].tokens, rel=0.01)
    assert stages["second"].batch_tokens == 4096
    assert (stages["sft"].batch_tokens, stages["dpo"].batch_tokens) == (1024, 512)


def test_post_training_comes_from_budgets():
    stages = scaled(recipe(), NANO).stages
    assert (stages["sft"].examples, stages["sft"].epochs) == (1000, 2)
    train_nodes = {node.name: node.settings for node in expand(scaled(recipe(), NANO)) if node.kind == "train"}
    assert train_nodes["sft"].tokens == 1000 * 2 * 50
    assert train_nodes["dpo"].tokens == 300 * 80


EXPERTS = {
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}


def test_the_familys_features_are_kept():
    model = scaled(recipe(), NANO).model
    assert (model.hidden_size, model.vocab_size, model.tokenizer) == (64, 500, "train")
    assert (model.attention_bias, model.tie_word_embeddings, model.num_experts) == (True, True, 0)
    mixture = replace(recipe(), model=ModelConfig(name="moe", **EXPERTS))
    assert scaled(mixture, NANO).model.num_experts == 4


GEMMA2 = ModelConfig(
    name="gemma2",
    family="gemma2",
    hidden_size=4608,
    num_attention_heads=32,
    num_key_value_heads=16,
    head_dim=128,
    attention_bias=False,
    post_norms=True,
    norms_add_one=True,
    scale_embeddings=True,
    sliding_window=4096,
    layer_types=["sliding_attention", "full_attention"],
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    query_pre_attn_scalar=144,
)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


@given(first=st.sampled_from([2048, 4096, 8192]), context=st.sampled_from([64, 128, 1024]))
def test_windows_and_stretched_positions_keep_their_ratio_to_the_context(first, context):
    made = replace(recipe(contexts=(first, 8 * first)), model=replace(GEMMA2, rope_parameters=LLAMA3))
    model = scaled(made, replace(NANO, context=context)).model
    assert model.sliding_window / context == 4096 / first
    assert model.rope_parameters == LLAMA3 | {"original_max_position_embeddings": 8192 * context // first}


def test_what_is_no_length_stays_and_the_scale_of_queries_follows_the_head():
    shape = NANO.shapes["policy"] | {"head_dim": None}  # 64 / 4
    model = scaled(replace(recipe(), model=GEMMA2), replace(NANO, shapes={"policy": shape})).model
    assert (model.head_size, model.query_pre_attn_scalar) == (16, 144 * 16 // 128)
    kept = ("post_norms", "norms_add_one", "scale_embeddings", "layer_types", "attn_logit_softcapping")
    for name in (*kept, "final_logit_softcapping", "family", "attention_bias"):
        assert getattr(model, name) == getattr(GEMMA2, name)
    assert [model.layer_attention(layer).window for layer in range(4)] == [128, None, 128, None]


def test_a_window_and_a_length_of_the_users_are_final():
    keys = ("model.sliding_window", "model.rope_parameters.original_max_position_embeddings")
    made = replace(recipe(pinned=frozenset(keys)), model=replace(GEMMA2, sliding_window=7, rope_parameters=LLAMA3))
    model = scaled(made, NANO).model
    assert (model.sliding_window, model.rope_parameters) == (7, LLAMA3)


def test_a_stage_stretches_positions_from_a_scaled_length():
    made = recipe()
    stretch = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
    made.stages["second"].rope_scaling = stretch
    stages = {node.name: node.settings for node in expand(scaled(made, NANO)) if node.kind == "train"}
    assert stages["second"].rope_scaling == stretch | {"original_max_position_embeddings": 128}
    assert stages["first"].rope_scaling is None


def test_the_reports_own_scale_changes_no_figure():
    made = recipe()
    same = scaled(made, PAPER)
    assert same.model == made.model
    for name, stage in same.stages.items():
        located = {"data": made.stages[name].data}
        assert replace(stage, **located) == made.stages[name]


FIELDS = {
    "stages.first.tokens": 123.0,
    "stages.first.context": 999,
    "stages.first.lr.peak": 0.25,
    "stages.second.batch_tokens": 777,
    "stages.second.lr.peak": 0.5,
    "stages.dpo.examples": 5.0,
    "model.hidden_size": 56,
    "evaluation.questions": 3,
    "tokenizer.vocab_size": 444,
}


@given(chosen=st.sets(st.sampled_from(sorted(FIELDS))))
def test_what_the_user_sets_is_final(chosen):
    """And moves nothing else: the other stages are mapped by the recipe's own figures."""
    made, published = recipe(), {}
    for key in chosen:
        *path, last = key.split(".")
        place = made
        for part in path:
            place = place[part] if isinstance(place, dict) else getattr(place, part)
        published |= {key: getattr(place, last)} if key.startswith("stages.") else {}
        setattr(place, last, FIELDS[key])
    scale = replace(NANO, minimum_peak_share=0.5)
    ours = scaled(replace(made, pinned=frozenset(chosen), published=published), scale)
    plain = scaled(recipe(), scale)
    for key, value in FIELDS.items():
        found, expected = ours, plain
        for part in key.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
            expected = expected[part] if isinstance(expected, dict) else getattr(expected, part)
        assert found == (value if key in chosen else expected)


def test_shapes_that_do_not_go_together():
    """A shape of the user's is held against that of the scale, not against the published one."""
    made = recipe(pinned=frozenset({"model.hidden_size"}))
    made.model.hidden_size = 66
    with pytest.raises(UserError, match=r"model: hidden_size \(66\).*num_attention_heads \(4\)"):
        scaled(made, NANO)


def test_a_corpus_that_is_dropped_and_one_that_is_missing():
    assert list(scaled(recipe(), NANO).stages["first"].data.sources) == ["web"]
    with pytest.raises(UserError, match=r"stages.first.data.sources.web: .*no corpus web.*wbe"):
        scaled(recipe(), replace(NANO, corpora={"wbe": SourceConfig(path="x"), "other": SourceConfig()}))


def test_columns_of_a_corpus_that_has_our_names_are_refused():
    columns = DataConfig(name="text", sources={"web": SourceConfig(columns={"text": "body"})})
    made = recipe()
    stages = made.stages | {"first": replace(made.stages["first"], data=columns)}
    scaled(replace(made, stages=stages), NANO)  # of a file they say something
    with pytest.raises(UserError, match=r"stages\.first\.data\.sources\.web\.columns: is given, .* embedded:web have"):
        scaled(replace(made, stages=stages), replace(NANO, corpora=CORPORA | {"web": SourceConfig("embedded:web")}))


def test_examples_of_unknown_length_are_refused():
    with pytest.raises(UserError, match=r"stages.sft.data.tokens_per_example"):
        scaled(recipe(), replace(PAPER, phases={}))


def test_scaling_is_done_once():
    once = scaled(recipe(), NANO)
    assert scaled(once) is once
    assert math.isclose(once.stages["first"].lr.peak, 3e-3)


@pytest.mark.parametrize(("share", "peaks"), [(0.0, (3e-3, 1e-3)), (0.3, (3e-3, 1e-3)), (0.5, (3e-3, 1.5e-3))])
def test_no_stage_peaks_lower_than_a_share_of_its_phase(share, peaks):
    given = recipe()
    given.stages["second"].lr = LearningRateConfig(peak=1e-4, final=1e-5)
    stages = scaled(given, replace(NANO, minimum_peak_share=share)).stages
    assert (stages["first"].lr.peak, stages["second"].lr.peak) == pytest.approx(peaks)
    assert stages["second"].lr.final == pytest.approx(peaks[1] / 10)
    assert stages["sft"].lr.peak == pytest.approx(7e-4)  # alone in its phase


def test_a_peak_of_the_users_own_is_not_raised():
    given = recipe(pinned=frozenset({"stages.second.lr.peak"}))
    given.stages["second"].lr = LearningRateConfig(peak=1e-4)
    assert scaled(given, replace(NANO, minimum_peak_share=0.5)).stages["second"].lr.peak == 1e-4


def test_a_peak_of_an_added_stage_raises_no_other():
    """It is of the scale's size, a hundred times what reports have."""
    added = ["+stage@stages.more=pretrain", "stages.more.tokens=1e6", "stages.more.context=128"]
    added += ["stages.more.batch_tokens=1024", "stages.more.lr.peak=5e-3"]
    plain, beside = (plan(compose("qwen2", overrides=words)).recipe.stages["pretrain"] for words in ([], added))
    assert beside.lr == plain.lr
