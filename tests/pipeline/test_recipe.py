"""A misspelt key anywhere is one line that names it and the nearest valid one; what is composed is checked."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from lightning_llm import compose
from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.optimization.config import LearningRateConfig
from lightning_llm.pipeline.checks import check
from lightning_llm.pipeline.composition import build_loader, compose_tree
from lightning_llm.pipeline.order import ancestors, order_of_stages
from lightning_llm.settings import UserError
from lightning_llm.stages.config import GenerateStage, JudgeStage, SelectStage, TrainStage

PAIR = """# @package _global_
defaults: [/model: qwen2_0_5b, /stage@stages.base: pretrain, /stage@stages.last: dpo, _self_]
stages:
  base: {tokens: 1e6, context: 128, batch_tokens: 1e3}
  last: {starts_from: base, examples: 10, context: 128, batch_tokens: 1e3}
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder of the user's own: a recipe of two stages, and others that have something wrong."""
    folder = tmp_path_factory.mktemp("mine")
    files = {
        "recipe/pair": PAIR,
        "recipe/key": PAIR.replace("examples: 10", "examples: 10, objective: {betta: 0.2}"),
        "recipe/value": PAIR.replace("examples: 10", "examples: 10, lr: {peak: high}"),
        "recipe/stage": PAIR + "  lsat: {tokens: 5}\n",
        "recipe/root": PAIR + "stagess: {base: {tokens: 1}}\n",
        "recipe/source": PAIR.replace("tokens: 1e6", "tokens: 1e6, data: {sources: {web: {wieght: 1}}}"),
        "recipe/shape": PAIR + "scale: {shapes: {policy: {hiden_size: 8}}}\n",
        "recipe/reference": PAIR.replace("1e6", "'${model.published.tokns}'"),
        "recipe/swapped": PAIR.replace("examples: 10", "examples: 10, objective: {label_smoothing: 0.1}"),
        "recipe/shorter": "# @package _global_\ndefaults: [pair, _self_]\nstages: {last: null}\n",
        "recipe/broken": "a: [1\n",
        "objective/mine": "name: mine\nbeta: 0.3\n",
        "experiment/key": "# @package _global_\nstages: {last: {objective: {betta: 1}}}\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
    return folder


# what is typed -> what the line must name: the place, the key, the remedy
COMMAND_LINE = {
    "stages.last.objective.betta=1": ["command line", "stages.last.objective.betta", "beta (number, default 0.1)"],
    "+stages.last.objective.betta=1": ["command line", "stages.last.objective.betta", "beta (number"],
    "stages.last.beta=1": ["stages.last.beta", "stages.last.objective.beta"],
    "stages.lsat.tokens=1": ["stages.lsat", "last"],
    "stage.last.tokens=1": ["stage ", "stages"],
    "+sed=1": ["command line", "sed", "seed (whole number, default 0)"],
    "modell=qwen2_7b": ["modell", "model"],
    "model=qwen2_7": ["qwen2_7", "qwen2_7b"],
    "scale=nan": ["command line"],
    "objectve@stages.last.objective=ipo": ["objectve", "objective"],
    "objective@stages.lsat.objective=ipo": ["objective@stages.lsat.objective", "objective@stages.last.objective"],
    "stages.last.lr.peak=high": ["stages.last.lr.peak", "'high'", "number"],
    "stages.last.tokens": ["'stages.last.tokens'", "key=value"],
    "stages.last.optimizer.betas=[0.9,inf]": ["command line", "betas[1] is inf, which is not finite"],
    "stages.last.tokens=1,2": ["stages.last.tokens", "-m"],
    "stages.last.objective.name=ipo": ["stages.last.objective.name is ipo", "objective@stages.last.objective=ipo"],
    "recipe=../recipe/pair": ["recipe: '../recipe/pair' is a path", "--config-dir"],
    "stages.base.context=[128]": ["stages.base.context: an entry of a ramp has the keys at and value, got 128"],
    "scale.pretraining_tokens=0": ["scale.pretraining_tokens: must be a number of at least 1"],
    "stages.last.rope_theta=-1": ["stages.last.rope_theta"],
    "scale.minimum_steps=0": ["scale.minimum_steps", "at least 1"],
    "scale.context=1": ["scale.context", "at least 4"],
    "scale.validation=2": ["scale.validation: must be a share below 1"],
    "scale.phases.preference.lr_factor=-1": ["scale.phases.preference.lr_factor", "at least 0"],
    "scale.phases.preference.examples=inf": ["scale.phases.preference.examples", "is inf"],
    "compute.threads=0": ["compute.threads", "at least 1"],
    "compute.efficiency=5": ["compute.efficiency", "at most 1"],
    "tokenizer.sample_bytes=-1": ["tokenizer.sample_bytes", "at least 1"],
    "+scale.phases.sftt.examples=5": ["scale.phases.sftt is not there", "The nearest is sft"],
    "stages.base.lr.warmup_share=2": ["stages.base.lr.warmup_share: is 2", "at most 1"],
    "+stage@stages.last=sft": ["stage@stages.last is chosen already", "stage@stages.last=sft, without the +"],
    "+stage@stages.new=sft": ["stages.new: wants exactly one of tokens", "as stages.new.tokens=1e6"],
    "+stage@stage.new=sft": ["command line: stage is not a setting", "stages"],
    "+stages.new=5": ["stages.new cannot be 5", "several settings"],
    "stages=[a]": ["stages cannot be a list"],
    "recipe=pair/": ["command line: pair/ is not an option of recipe", "pair"],
    "recipe=": ["command line: '' is not an option of recipe"],
    "=5": ["'=5' names no key"],
    "~hydra": ["nothing chooses hydra"],
    "logger.tensorboard.directory=x": ["logger.tensorboard is not there", "logger=tensorboard"],
    "seed=99999999999999999999": ["seed: is 1e+20"],
    "~stages.last.examplez": ["stages.last.examplez is not a setting of a stage", "examples (number"],
    "~stages.lsat": ["stages.lsat", "The nearest is last"],
    "~stages.last.epochz=1": ["stages.last.epochz", "epochs"],
    "~modell": ["modell", "model"],
    "~stages.last.steps": ["stages.last.steps", "cannot be taken away"],
    "~seed=1": ["seed is 0, not 1", "~seed"],
    "~scale": ["scale: nothing is chosen", "scale=NAME"],
    "+seed=1": ["seed is there already", "seed=VALUE, without the +"],
    "model=null": ["model cannot be null", "qwen2_7b"],
    "scale=null": ["scale cannot be null", "nano, paper, small"],
    "compute=1": ["compute cannot be 1", "cpu, ddp, gpu"],
    "stages=null": ["stages cannot be null"],
    "stages.base=null": ["stages.last.starts_from: base"],
    "stages.last.lr=null": ["stages.last.lr cannot be null"],
    "logger=[tensorbord]": ["command line", "tensorbord", "The nearest is tensorboard"],
    "experiment=x": ["command line", "x is not an option of experiment", "dpo_beta"],
    "stages.last.lr.peak=inf": ["stages.last.lr.peak is inf", "finite"],
    "stages.last.starts_from=bsae": ["stages.last.starts_from: bsae", "The nearest is base (known: base)"],
    "stages.base.starts_from=lst": ["stages.base.starts_from: lst", "starts_from=null"],
    "~stages.last.lr": ["stages.last.lr", "taken away"],
    "+model.rope_parameters.rope_thet=1": ["model.rope_parameters.rope_thet", "rope_theta"],
    "stages.last.rope_scaling={rope_type: yarn, factor: 4}": [
        "stages.last.rope_scaling: original_max_position_embeddings has no value, and rope_type yarn needs one"
    ],
    "stages.last.rope_scaling={rope_type: linear, facter: 4}": ["stages.last.rope_scaling.facter", "factor"],
    "stages.last.rope_scaling=4": ["stages.last.rope_scaling: 4 is no mapping"],
    "model.intermediate_size=0": ["model.intermediate_size: must be at least 1, got 0", "Mend it, or leave it out"],
    "model.head_dim=0": ["model.head_dim: must be at least 1, got 0"],
    "model.num_hidden_layers=0": ["model.num_hidden_layers: must be at least 1"],
    "model.max_position_embeddings=0": ["model.max_position_embeddings: must be at least 1"],
    "model.rms_norm_eps=-1": ["model.rms_norm_eps: must be above 0"],
    "model.initializer_range=-1": ["model.initializer_range: must be above 0"],
    "model.hidden_act=relu": ["model.hidden_act: must be silu or gelu_pytorch_tanh, got relu"],
    "stages.last.data.sources.preferences.max_rows=0": [
        "stages.last.data.sources.preferences.max_rows: must be at least 1, is 0"
    ],
    # new keys of open mappings: what to type, or the nearest
    "model.rope_parameters.factor=4": ["Type +model.rope_parameters.factor=4, with a plus"],
    "model.rope_parameters={rope_type: linear, factor: 4}": [
        "model.rope_parameters.factor is not there yet",
        "Type '+model.rope_parameters={rope_type: linear, factor: 4}', with a plus",
    ],
    "model.rope_parameters.facter=4": ["model.rope_parameters.facter", "The nearest is factor"],
    "scale.shapes.policy.rms_norm_eps=1e-5": ["Type +scale.shapes.policy.rms_norm_eps=1e-5, with a plus"],
    "stages.last.data.sources.preferences.columns={chosen: good}": [
        "Type '+stages.last.data.sources.preferences.columns={chosen: good}', with a plus"
    ],
    "stages.last.data.sources.preferences.columns.chose=good": ["columns.chose", "The nearest is chosen"],
    "+scale.corpora.preferences.columns.chosen=good": [
        "scale.corpora.preferences.columns: is given, and the fields of embedded:preferences have our names already"
    ],
    "stages.last.data.sources.preferences.options.split=test": [
        "Type +stages.last.data.sources.preferences.options.split=test, with a plus"
    ],
    "stages.last.rope_scaling.factor=4": ["Type +stages.last.rope_scaling.factor=4, with a plus"],
    "+model.published.tokns=1": ["model.published.tokns", "tokens"],
    "+stages.base.data.sources.wbe.weight=1": ["stages.base.data.sources.wbe"],
    "+hydra.job.nam=x": ["hydra.job.nam", "name"],
    "stages.last.objective.beta=-1": ["stages.last.objective", "beta"],
    "seed=-1": ["seed", "at least 0"],
}


@pytest.mark.parametrize("typed", COMMAND_LINE)
def test_a_mistake_on_the_command_line(typed, mine):
    with pytest.raises(UserError) as caught:
        compose("pair", overrides=[typed], config_dir=mine)
    assert "\n" not in str(caught.value)
    for part in COMMAND_LINE[typed]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "typed", [typed for typed, parts in COMMAND_LINE.items() if any("with a plus" in part for part in parts)]
)
def test_what_a_mistake_says_to_type_is_understood(typed, mine):
    """Type it, and no key is refused any more; what it sets may still be wrong."""
    with pytest.raises(UserError, match="with a plus") as caught:
        compose("pair", overrides=[typed], config_dir=mine)
    (advised,) = shlex.split(re.search(r"Type (.*), with a plus", str(caught.value))[1])
    said = ""
    try:
        compose("pair", overrides=[advised], config_dir=mine)
    except UserError as error:
        said = str(error)
    assert not re.search("is not there|is not a setting|plus", said)


def test_a_stage_of_null_is_left_out(mine):
    """So a recipe takes from one that it extends what it wants."""
    assert list(compose("shorter", config_dir=mine).stages) == ["base"]
    assert list(compose("pair", overrides=["stages.last=null"], config_dir=mine).stages) == ["base"]
    with pytest.raises(UserError, match=r"a stage that the recipe leaves out, stages\.last\. Leave it out"):
        compose("shorter", overrides=["stages.last.examples=5"], config_dir=mine)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("stages.base.model.hidden_size=3", r"stages\.base\.model is null, .* \+model@stages\.base\.model=NAME gives"),
        ("stages.base.judge.name=x", r"stages\.base\.judge is null, .* \+judge@stages\.base\.judge=NAME gives"),
        ("stages.base.rollout.prompts=3", r"rollout is null, and .* a stage that has one: stage@stages\.base=NAME"),
        (
            "stages.base.rollout={prompts: 3}",
            r"rollout is null, and settings of it are given\. .* stage@stages\.base=NAME",
        ),
    ],
)
def test_a_setting_of_a_part_that_a_stage_does_without_is_not_one_of_a_stage_left_out(typed, says, mine):
    with pytest.raises(UserError, match=says):
        compose("pair", overrides=["stages.last.lr.peak=1e-3", typed, "seed=3"], config_dir=mine)


FILES = {
    "key": ["recipe/key.yaml", "stages.last.objective.betta", "beta"],
    "value": ["recipe/value.yaml", "stages.last.lr.peak", "'high'"],
    "stage": ["stages.lsat", "last"],
    "root": ["recipe/root.yaml", "stagess", "stages"],
    "source": ["recipe/source.yaml", "stages.base.data.sources.web.wieght", "weight"],
    "shape": ["scale.shapes.policy.hiden_size", "hidden_size"],
    "reference": ["stages.base.tokens", "model.published.tokns"],
    "broken": ["recipe/broken.yaml:2", "not YAML"],
    "piar": ["piar", "pair"],
}


@pytest.mark.parametrize("recipe", FILES)
def test_a_mistake_in_a_file(recipe, mine):
    with pytest.raises(UserError) as caught:
        compose(recipe, config_dir=mine)
    assert "\n" not in str(caught.value)
    for part in FILES[recipe]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "typed", "parts"),
    [
        ("swapped", "objective@stages.last.objective=ipo", ["recipe/swapped.yaml", "label_smoothing", "ipo"]),
        ("pair", "objective@stages.last.objective=mine", ["objective/mine.yaml", "beta", "dpo"]),
        ("pair", "experiment=key", ["experiment/key.yaml", "stages.last.objective.betta", "beta"]),
    ],
)
def test_a_mistake_in_what_is_chosen(recipe, typed, parts, mine):
    """A value that stays behind when its option goes, a file that names no schema, an experiment."""
    with pytest.raises(UserError) as caught:
        compose(recipe, overrides=[typed], config_dir=mine)
    for part in parts:
        assert part in str(caught.value)


@pytest.fixture(scope="module")
def pair(mine):
    return compose("pair", config_dir=mine)


@pytest.mark.parametrize(
    ("stage", "changes", "parts"),
    [
        ("last", {"starts_from": "bas"}, ["stages.last.starts_from", "bas", "base"]),
        ("base", {"starts_from": "last"}, ["circle", "base -> last -> base"]),
        ("last", {"starts_from": None}, ["stages.last.starts_from", "reference"]),
        ("last", {"context": [{"at": 5, "value": 8}]}, ["stages.last.context", "starts at 0"]),
        ("last", {"tokens": 5.0}, ["stages.last", "exactly one", "tokens and examples"]),
        ("base", {"context": 1e30}, ["stages.base.context", "1e+30", "below"]),
        ("base", {"context": float("inf")}, ["stages.base.context", "inf", "below"]),
        ("base", {"context": [{"at": 0, "value": 64}, {"at": 99, "value": 65.5}]}, ["stages.base.context", "whole"]),
        ("base", {"context": -8}, ["stages.base.context", "-8", "at least 4"]),
        ("base", {"batch_tokens": 2**31}, ["stages.base.batch_tokens", "below"]),
        ("base", {"batch_tokens": None}, ["stages.base.batch_tokens", "no value"]),
        ("base", {"phase": "pretraim"}, ["stages.base.phase", "pretrain"]),
        ("base", {"lr": LearningRateConfig(warmup_steps=1, warmup_tokens=1)}, ["stages.base.lr", "at most one"]),
        ("base", {"data": DataConfig(name="mine", form="pairs")}, ["stages.base.data", "mine", "pairs"]),
        ("base", {"data": DataConfig(name="mine", on_long="dorp")}, ["stages.base.data.on_long", "drop"]),
    ],
)
def test_what_cannot_run_is_refused(stage, changes, parts, pair):
    stages = pair.stages | {stage: replace(pair.stages[stage], **changes)}
    with pytest.raises(UserError) as caught:
        check(replace(pair, stages=stages))
    for part in parts:
        assert part in str(caught.value)


def test_what_the_user_sets_is_known(mine):
    (mine / "experiment" / "good.yaml").write_text(
        "# @package _global_\nstages: {base: {lr: {peak: 0.5}, tokens: 7}}\n"
    )
    words = ["experiment=good", "stages.last.objective={beta: 0.3}", "objective@stages.last.objective=ipo", "seed=3"]
    recipe = compose("pair", overrides=words, config_dir=mine)
    assert recipe.pinned == {"stages.base.lr.peak", "stages.base.tokens", "stages.last.objective.beta", "seed"}
    assert recipe.published["stages.base.tokens"] == 1e6
    assert recipe.published.keys() == {"stages.base.tokens", "stages.base.lr.peak"}
    assert (recipe.name, recipe.seed, recipe.stages["base"].lr.peak) == ("pair", 3, 0.5)
    assert recipe.stages["last"].objective.name == "ipo"


def test_a_jobs_loader_finds_what_ours_finds_in_one_go(mine):
    """Hydra's own loader, which a command line has, merges the files once more to see what they say."""
    words = ["recipe=pair", "stages.last.tokens=5", "stages.base.context=64", "model.hidden_size=8", "seed=3"]
    ours = compose_tree("run", words, mine)
    theirs = compose_tree("run", words, loader=ConfigLoaderImpl(build_loader(mine).config_search_path))
    assert ours.published == theirs.published
    assert ours.published.keys() == {"stages.last.tokens", "stages.base.context", "model.hidden_size"}
    assert (ours.pinned, ours.config) == (theirs.pinned, theirs.config)


def test_a_length_of_the_users_takes_the_place_of_the_recipes(mine):
    words = ["stages.last.tokens=500", "stages.base.lr.warmup_steps=3"]
    stages = compose("pair", overrides=words, config_dir=mine).stages
    assert (stages["last"].tokens, stages["last"].examples) == (500, None)
    assert (stages["base"].lr.warmup_steps, stages["base"].lr.warmup_share) == (3, None)


def test_compose_inside_somebody_elses_hydra(tmp_path, mine):
    import hydra

    (tmp_path / "config.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("pair", config_dir=mine).name == "pair"
        assert hydra.compose("config").a == 1


EDGES = {
    "no model": ({"sample": GenerateStage(models=["bas"])}, ["stages.sample.models: bas", "The nearest is base"]),
    "no stage": ({"score": JudgeStage(data=["sampel"])}, ["stages.score.data: sampel is no stage", "sample"]),
    "another kind": (
        {"best": SelectStage(data=["base"])},
        ["stages.best.data: base is a stage of kind train", "sample"],
    ),
    "no training": (
        {"sample": GenerateStage(models=["best"])},
        ["stages.sample.models: best is a stage of kind select"],
    ),
    "rows of no stage": (
        {"base": TrainStage(data=DataConfig(sources={"own": SourceConfig(path="stage:bst")}))},
        ["stages.base.data.sources.own.path: bst is no stage"],
    ),
    "circle of rows": (
        {"base": TrainStage(data=DataConfig(sources={"own": SourceConfig(path="stage:best")}))},
        ["goes round in a circle (base -> best -> sample -> base)"],
    ),
}


@pytest.mark.parametrize("case", EDGES)
def test_an_edge_that_leads_nowhere(case):
    changes, parts = EDGES[case]
    stages = {"base": TrainStage(), "sample": GenerateStage(models=["base"]), "best": SelectStage(data=["sample"])}
    with pytest.raises(UserError) as caught:
        order_of_stages(stages | changes)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_stage_comes_after_all_that_it_is_made_from(tmp_path):
    stages = {
        "last": TrainStage(starts_from="one", data=DataConfig(sources={"own": SourceConfig(path="stage:best")})),
        "best": SelectStage(data=["score", "sample"]),
        "score": JudgeStage(data=["sample"], judged_by=["reward", str(tmp_path)]),
        "sample": GenerateStage(models=["two", "one"]),
        "two": TrainStage(starts_from="one"),
        "one": TrainStage(),
        "reward": TrainStage(starts_from="one"),
        "apart": TrainStage(),
    }
    assert order_of_stages(stages) == ["one", "reward", "two", "sample", "score", "best", "last", "apart"]
    assert ancestors("score", stages) == {"score", "sample", "two", "one", "reward"}


def test_stages_come_after_what_they_start_from():
    edges = {"c": "b", "a": None, "b": "a", "d": "a"}
    assert order_of_stages({name: TrainStage(starts_from=source) for name, source in edges.items()}) == list("abcd")
