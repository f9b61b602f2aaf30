"""A composed tree as a Recipe of dataclasses, with every key known and every edge checked.

The last file that knows OmegaConf: what comes out is plain Python, and nobody downstream asks upstream a question.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_llm.data.config import SHORTEST_CONTEXT, DataConfig, SourceConfig, TokenizerConfig
from lightning_llm.data.embedded.options import check_embedded
from lightning_llm.data.places import is_prepared, source_options, split_path
from lightning_llm.evaluation.config import EvaluationConfig
from lightning_llm.models.config import ModelConfig, check_scaling, check_values
from lightning_llm.pipeline.config import LimitsConfig, RecipeSettings, ScaleConfig, StoreConfig
from lightning_llm.pipeline.mappings import PHASES, known_entries
from lightning_llm.pipeline.mistakes import (
    COMMAND_LINE,
    file_of,
    groups,
    name_nearest,
    unknown_entry,
    unknown_setting,
    without_schema,
)
from lightning_llm.schedules import as_ramp
from lightning_llm.settings import OPTIONS, Buildable, UserError
from lightning_llm.stages.config import ComputeConfig, TrainStage
from lightning_llm.training.config import LoggerConfig

if TYPE_CHECKING:
    from lightning_llm.pipeline.composition import Composition

MOST_TOKENS = 2**31  # of a context or a batch: kernels count a batch's tokens in 32 bits
ATTENTION = ("auto", "sdpa", "varlen", "flex", "flash")  # compute.attention


@dataclass(frozen=True)
class Recipe:
    """A graph of stages with all that it takes to run it. Made by `compose`, mapped by `scaled`, never changed."""

    name: str
    model: ModelConfig
    tokenizer: TokenizerConfig
    stages: dict[str, TrainStage]
    evaluation: EvaluationConfig
    scale: ScaleConfig
    compute: ComputeConfig
    logger: dict[str, LoggerConfig] = field(default_factory=dict)  # besides metrics.jsonl
    seed: int = 0
    store: StoreConfig = field(default_factory=StoreConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    runs: str = "runs"
    overrides: tuple[str, ...] = ()  # as the user gave them
    pinned: frozenset[str] = frozenset()  # keys that the user has set: `scaled` leaves them alone
    published: dict[str, Any] = field(default_factory=dict)  # what the recipe itself says for what is pinned
    is_scaled: bool = False

    def is_pinned(self, key: str) -> bool:
        """Whether the user has set `key`, a part of it, or what it is part of."""
        return any(key == pin or key.startswith(pin + ".") or pin.startswith(key + ".") for pin in self.pinned)


def compose(
    recipe: str, scale: str = "nano", overrides: Sequence[str] = (), config_dir: str | Path | None = None
) -> Recipe:
    """Compose a recipe as `lightning-llm run recipe=... scale=... OVERRIDES` would; works inside a Hydra job too.

    Args:
        recipe, scale: options of conf/recipe/ and conf/scale/.
        overrides: as on the command line; what they set is final, whatever the scale.
        config_dir: a folder of your own YAML files, searched besides ours.

    Raises:
        UserError: a misspelt key, a wrong type, an unknown option; names the key and the nearest valid one.
    """
    from lightning_llm.pipeline.composition import compose_tree

    return build_recipe(compose_tree("run", [f"recipe={recipe}", f"scale={scale}", *overrides], config_dir))


def build_recipe(composition: Composition, settings: RecipeSettings | None = None) -> Recipe:
    """The recipe of a composed tree.

    Args:
        settings: what `build_settings` made of it, if that is known.

    Raises:
        UserError: as `compose`.
    """
    settings = settings or build_settings(composition)
    assert composition.recipe is not None
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", composition.recipe):  # runs are put in a folder of this name
        what = f"{composition.recipe!r} is a path"
        raise UserError("recipe", what, "Give the name of a file in recipe/, and its folder with --config-dir")
    names = {f.name for f in dataclasses.fields(Recipe)} - {"name", "overrides", "pinned", "published", "is_scaled"}
    given = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    recipe = Recipe(
        composition.recipe,
        overrides=tuple(composition.overrides),
        pinned=composition.pinned,
        published=composition.published,
        **given,
    )
    recipe = dataclasses.replace(
        recipe, stages={name: _one_length(recipe, name, stage) for name, stage in recipe.stages.items()}
    )
    check(recipe)
    return recipe


def build_settings(composition: Composition) -> Any:
    """The dataclass of a verb, every key checked against its field.

    Raises:
        UserError: no recipe is chosen, an unknown or missing key, a reference to nothing, a value that is refused.
    """
    reader = _Reader(composition)
    reader.refuse_unknown(composition.config, "")
    if "stages" in composition.config and composition.recipe is None:
        from lightning_llm.pipeline.composition import CONF

        known = ", ".join(sorted(path.stem for path in (CONF / "recipe").glob("*.yaml")))
        raise UserError("recipe", "none is chosen", f"Give recipe=NAME; known: {known}")
    try:
        return reader.build(composition.config, "")
    except OmegaConfBaseException as error:
        first = str(error).split("\n")[0]
        raise UserError(str(error.full_key or composition.verb), first, "Refer to a key that is there") from error


def refuse_unknown_keys(composition: Composition) -> None:
    """Refuse every key that is no field of its dataclass. `+key=...` and YAML under an untyped node get past Hydra's
    schemas; nothing gets past this.

    Raises:
        UserError: names the key and the nearest valid one.
    """
    _Reader(composition).refuse_unknown(composition.config, "")


class _Reader:
    """Walks the tree: first over the keys, then over the values."""

    def __init__(self, composition: Composition):
        self.composition = composition

    def refuse_unknown(self, node: Any, path: str) -> None:
        """Raises UserError for the first key below `path` that is no field and no known entry."""
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
            return
        schema = OmegaConf.get_type(node)
        known = self._known_entries(path)
        if isinstance(schema, type) and dataclasses.is_dataclass(schema):
            known = [f.name for f in dataclasses.fields(schema)]
        for name in map(str, node._content):  # pyright: ignore[reportArgumentType, reportCallIssue]
            key = _join(path, name)
            if known is not None and name not in known:
                if dataclasses.is_dataclass(schema):
                    raise unknown_setting(key, schema, self._origin(key))  # pyright: ignore[reportArgumentType]
                raise unknown_entry(key, known, self._origin(key))
            self.refuse_unknown(node._get_node(name), key)

    def _known_entries(self, path: str) -> Sequence[str] | None:
        """The keys of a mapping that is no dataclass, where they are not free."""
        if path == "model.published":  # a figure is known if something refers to it, or a model of ours states it
            named = set(re.findall(r"\$\{model\.published\.(\w+)\}", OmegaConf.to_yaml(self.composition.config)))
            return sorted(named | _figures_of_our_models())
        return known_entries(path)

    def build(self, node: Any, path: str) -> Any:
        """The value at a dotted path: dataclasses of dataclasses, lists and plain values.

        Raises:
            UserError: a value is missing, taken away or refused by its dataclass.
        """
        if isinstance(node, ListConfig):
            return [self.build(node[i], f"{path}[{i}]") for i in range(len(node))]
        if not isinstance(node, DictConfig):
            return node
        if node._is_none():
            return None
        schema = OmegaConf.get_type(node)
        if not (isinstance(schema, type) and dataclasses.is_dataclass(schema)):
            return {str(name): self.build(node[name], _join(path, name)) for name in node}
        if issubclass(schema, Buildable) and not hasattr(schema, "implementation"):
            file = self._file_chosen(path)
            if file or not OmegaConf.is_missing(node, "name"):
                raise without_schema(path, schema, file or self._origin(path))
        hints = typing.get_type_hints(schema)
        values = {}
        for name in (f.name for f in dataclasses.fields(schema)):
            key = _join(path, name)
            if OmegaConf.is_missing(node, name):
                raise self._missing(key)
            if name not in node:
                raise UserError(self._origin(key), f"{key} cannot be taken away", "Give it a value instead")
            value = self.build(node[name], key)
            values[name] = tuple(value) if typing.get_origin(hints[name]) is tuple else value
        if issubclass(schema, Buildable):
            self._refuse_other_name(path, schema, values["name"])
        if (
            schema is ModelConfig
        ):  # a shape of the user's need not go with the published one, only with the scale's: `scaled`
            model = object.__new__(schema)
            vars(model).update(values)
            try:
                check_values(model)
            except ValueError as error:
                name, _, fact = str(error).partition(" ")
                raise UserError(f"{path}.{name}", fact, "Mend it, or leave it out: the model has its own") from error
            return model
        try:
            return schema(**values)
        except ValueError as error:
            raise UserError(path or self.composition.verb, str(error), "Mend it") from error

    def _missing(self, key: str) -> UserError:
        if key.startswith("stages."):
            _, stage, *_ = key.split(".")
            others = [name for name in self.composition.config.stages if name != stage]
            return UserError(
                self._origin(f"stages.{stage}"),
                f"stages.{stage} has no {key.split('.', 2)[2].removesuffix('.name')}",
                f"{name_nearest(stage, others)}; a new one begins with an option of conf/stage/",
            )
        group, _, name = key.rpartition(".")
        if name == "name" and self.composition.loader and group in groups(self.composition.loader):
            return UserError(group, "nothing is chosen", f"Give {group}=NAME, or choose one in the defaults of a file")
        return UserError(key, "has no value", f"Give {key}=..., or choose an option of the group")

    def _refuse_other_name(self, path: str, schema: type, name: str) -> None:
        """`objective.name=dpo` would train what it trained before, and call it dpo."""
        for (group, option), settings in OPTIONS.items():
            if settings is schema and OPTIONS.get((group, name), schema) is not schema:
                what = f"{path}.name is {name}, and the settings are those of {option}"
                raise UserError(self._origin(f"{path}.name"), what, f"Choose with {group}@{path}={name}")

    def _file_chosen(self, path: str) -> str | None:
        """The file that an option of a group, as `optimizer@stages.sft.optimizer=mine`, brings to a path."""
        for place, option in self.composition.choices.items():
            group, at, package = place.partition("@")
            if at and package == path:
                return file_of(f"{group}/{option}", self.composition.loader)
        return None

    def _origin(self, key: str) -> str:
        """Where a key comes from: the command line if the user has set it or what it is part of, else its file."""
        if any(key == pin or key.startswith(pin + ".") or pin.startswith(key + ".") for pin in self.composition.pinned):
            return COMMAND_LINE
        return self.composition.file_stating(key) or self.composition.verb


@functools.cache
def _figures_of_our_models() -> frozenset[str]:
    """All that a file in conf/model/ states under `published:`."""
    from lightning_llm.pipeline.composition import CONF

    texts = (path.read_text("utf-8").partition("\npublished:")[2] for path in (CONF / "model").glob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"^  (\w+):", text, re.MULTILINE))


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


# ---- what a tree of known keys may still have wrong ----

LENGTHS = ("tokens", "examples", "steps")
WARMUPS = ("warmup_tokens", "warmup_steps", "warmup_share")


def _one_length(recipe: Recipe, name: str, stage: TrainStage) -> TrainStage:
    """A length or a warm-up that the user gives takes the place of the recipe's own, in whatever unit that is."""

    def winner(config: Any, key: str, units: Sequence[str]) -> dict[str, None]:
        given = [unit for unit in units if f"{key}.{unit}" in recipe.pinned and getattr(config, unit) is not None]
        return dict.fromkeys(set(units) - set(given)) if len(given) == 1 else {}

    lr = dataclasses.replace(stage.lr, **winner(stage.lr, f"stages.{name}.lr", WARMUPS))
    return dataclasses.replace(stage, lr=lr, **winner(stage, f"stages.{name}", LENGTHS))


def check(recipe: Recipe) -> None:
    """Refuse what cannot run, before anything does.

    Raises:
        UserError: names the key.
    """
    if not recipe.stages:
        raise UserError(f"recipe {recipe.name}", "has no stages", "Add one: +stage@stages.NAME=pretrain")
    for name, stage in recipe.stages.items():
        _check_name(name)
        _check_stage(f"stages.{name}", stage, recipe)
    for part in ("text", "tasks", "pairs"):
        _check_data(f"evaluation.{part}", getattr(recipe.evaluation, part))
    order_of_stages(recipe.stages)
    check_compute(recipe.compute)
    _in_range("limits.hours", recipe.limits.hours, low=0)
    _in_range("seed", recipe.seed, low=0, below=2**63)
    known = _known_corpora(recipe)
    for name, source in recipe.scale.corpora.items():
        if name not in known:
            raise UserError(f"scale.corpora.{name}", "is the corpus of no mixture", name_nearest(name, sorted(known)))
        _check_source(f"scale.corpora.{name}", source)
    for name, source in recipe.tokenizer.sources.items():
        _check_source(f"tokenizer.sources.{name}", source)


def check_compute(compute: ComputeConfig) -> None:
    """Refuse devices, precisions and kernels that are none.

    Raises:
        UserError: names the key.
    """
    _one_of("compute.precision", compute.precision, ("fp32", "bf16"))
    _one_of("compute.strategy", compute.strategy, ("single", "ddp"))
    _one_of("compute.accelerator", compute.accelerator, ("cpu", "gpu"))
    _one_of("compute.attention", compute.attention, ATTENTION)
    _one_of("compute.activation_checkpointing", compute.activation_checkpointing, ("none", "full"))
    _in_range("compute.devices", compute.devices, low=1)
    if compute.devices > 1 and compute.strategy == "single":
        raise UserError("compute.devices", f"is {compute.devices} with strategy single", "Set compute.strategy=ddp")
    _in_range("compute.micro_batch_tokens", compute.micro_batch_tokens, low=1)
    for name in ("flops_per_second", "efficiency", "memory_gib"):
        _in_range(f"compute.{name}", getattr(compute, name), above=0)


def _check_name(name: str) -> None:
    if not name.replace("_", "").isalnum() or name in ("tokenizer", "evaluation"):
        raise UserError(
            f"stages.{name}", "is no name for a stage", "Use letters, digits and _; tokenizer and evaluation are taken"
        )


def _check_stage(key: str, stage: TrainStage, recipe: Recipe) -> None:
    _one_of(f"{key}.kind", stage.kind, ("train",))
    _one_of(f"{key}.phase", stage.phase, PHASES)
    given = [unit for unit in LENGTHS if getattr(stage, unit) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        remedy = "Set the others to null" if given else f"Give one, as {key}.tokens=1e6"
        raise UserError(key, f"wants exactly one of {', '.join(LENGTHS)}, has {found}", remedy)
    for name in (*given, "epochs"):
        _in_range(f"{key}.{name}", getattr(stage, name), above=0)
    for name in ("context", "batch_tokens"):
        if getattr(stage, name) is None:
            raise UserError(f"{key}.{name}", "has no value", f"Give {key}.{name}=...")
        try:
            ramp = as_ramp(getattr(stage, name))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{key}.{name}", str(error), "Give a number or [{at: 0, value: ...}, ...]") from error
        for entry in ramp:
            _whole(f"{key}.{name}", entry["value"], low=SHORTEST_CONTEXT if name == "context" else 1, below=MOST_TOKENS)
        if (
            name == "context"
            and len(ramp) > 1
            and stage.data.on_long == "truncate_left"
            and stage.objective.needs_reference
        ):
            raise UserError(
                f"{key}.context",
                "is a ramp, and data.on_long truncates: the reference would see other prompts than the policy",
                f"Give one context, or set {key}.data.on_long=drop",
            )
    warmups = [unit for unit in WARMUPS if getattr(stage.lr, unit) is not None]
    if len(warmups) > 1:
        raise UserError(f"{key}.lr", f"wants at most one of {', '.join(WARMUPS)}", "Set the others to null")
    for unit in warmups:
        _in_range(f"{key}.lr.{unit}", getattr(stage.lr, unit), low=0)
    if stage.lr.warmup_share is not None and stage.lr.warmup_share > 1:
        raise UserError(f"{key}.lr.warmup_share", f"is {stage.lr.warmup_share:g}", "It is a share: at most 1")
    _in_range(f"{key}.lr.peak", stage.lr.peak, low=0)
    if stage.lr.final is not None:
        _in_range(f"{key}.lr.final", stage.lr.final, low=0)
    if stage.evaluate_every is not None:
        _in_range(f"{key}.evaluate_every", stage.evaluate_every, above=0)
    if stage.rope_scaling:
        try:
            check_scaling(stage.rope_scaling)
        except ValueError as error:
            remedy = "Give {rope_type: linear, factor: ...} or another"
            raise UserError(f"{key}.rope_scaling", str(error), remedy) from error
    objective = stage.objective
    if objective.needs_pairs != (stage.data.form == "pairs"):
        raise UserError(
            f"{key}.data",
            f"{stage.data.name} holds {stage.data.form}, and {objective.name} does not learn from that",
            "causal_lm learns from text and conversations, dpo and ipo from pairs",
        )
    if objective.needs_reference and stage.starts_from is None:
        raise UserError(f"{key}.starts_from", f"has no value, and {objective.name} needs a reference", "Name a stage")
    _check_data(f"{key}.data", stage.data)


def _check_data(key: str, data: DataConfig) -> None:
    _one_of(f"{key}.form", data.form, ("text", "conversations", "pairs", "questions"))
    _one_of(f"{key}.on_error", data.on_error, ("stop", "skip"))
    _one_of(f"{key}.on_long", data.on_long, ("drop", "truncate_left", "stop"))
    _in_range(f"{key}.validation", data.validation, low=0, below=1)
    _in_range(f"{key}.max_epochs", data.max_epochs, above=0)
    for name, source in data.sources.items():
        _check_source(f"{key}.sources.{name}", source)


def _known_corpora(recipe: Recipe) -> set[str]:
    """What a corpus may be called: as a source of this recipe, or of a scale of ours (which serve all recipes)."""
    mixtures = [stage.data for stage in recipe.stages.values()]
    mixtures += [getattr(recipe.evaluation, part) for part in ("text", "tasks", "pairs")]
    return {name for data in mixtures for name in data.sources} | _corpora_of_our_scales()


@functools.cache
def _corpora_of_our_scales() -> frozenset[str]:
    from lightning_llm.pipeline.composition import CONF

    files = (OmegaConf.to_container(OmegaConf.load(path)) for path in sorted(CONF.glob("scale/*.yaml")))
    return frozenset(name for file in files if isinstance(file, dict) for name in file.get("corpora", {}))


def _check_source(key: str, source: SourceConfig) -> None:
    if source.path is not None:
        known = source_options(source.path, key)
        for name in source.options:
            if name not in known:
                raise unknown_entry(f"{key}.options.{name}", known, source.path)
        kind, name = split_path(source.path, key)
        if kind == "embedded":
            check_embedded(name, source.options, key)
        for name in ("columns", "max_rows"):
            if getattr(source, name) and is_prepared(source.path):
                what = f"is given, and {source.path} holds tokens, no rows any more"
                raise UserError(f"{key}.{name}", what, "Take it away, or name the rows that the tokens were made of")
    try:
        ramp = as_ramp(source.weight)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{key}.weight", str(error), "Give a number or [{at: 0, value: ...}, ...]") from error
    for entry in ramp:
        _in_range(f"{key}.weight", entry["value"], low=0)


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(key, f"{value!r} is not one of its values", name_nearest(str(value), known))


def _in_range(
    key: str, value: Any, low: float = float("-inf"), above: float = float("-inf"), below: float = float("inf")
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(key, f"is {value!r} and not a number", "Give a number")
    if not (value >= low and value > above and value < below):
        wanted = [f"at least {low:g}" * (low > float("-inf")), f"above {above:g}" * (above > float("-inf"))]
        wanted += [f"below {below:g}" * (below < float("inf"))]
        if not math.isfinite(value):
            wanted = ["finite", *wanted]
        raise UserError(key, f"is {value:g}", f"It must be {' and '.join(filter(None, wanted))}")


def _whole(key: str, value: Any, low: int, below: int) -> None:
    _in_range(key, value, low=low, below=below)
    if value != int(value):
        raise UserError(key, f"is {value:g} tokens", "Give a whole number")


def _descends(stage: str, ancestor: str, stages: Mapping[str, TrainStage]) -> bool:
    """Whether a stage is `ancestor` or starts, in the end, from it."""
    seen: set[str] = set()
    at: str | None = stage
    while at is not None and at in stages and at not in seen:
        if at == ancestor:
            return True
        seen.add(at)
        at = stages[at].starts_from
    return False


def order_of_stages(stages: Mapping[str, TrainStage]) -> list[str]:
    """Names of the stages, each after the one that it starts from.

    Raises:
        UserError: a stage starts from what is neither a stage nor a folder, or from itself in the end.
    """
    for name, stage in stages.items():
        source = stage.starts_from
        earlier = [other for other in stages if not _descends(other, name, stages)]
        if source is not None and source not in stages and not Path(source).expanduser().is_dir():
            raise UserError(
                f"stages.{name}.starts_from",
                f"{source} is neither a stage nor a folder with a model",
                name_nearest(source, earlier) if earlier else "Name a folder, or take it away: starts_from=null",
            )
    order: list[str] = []
    for name in stages:
        chain: list[str] = []
        at: str | None = name
        while at is not None and at not in order:
            if at in chain:
                circle = " -> ".join([*chain[chain.index(at) :], at])
                raise UserError(
                    f"stages.{at}.starts_from", f"goes round in a circle ({circle})", "Let one of them start anew"
                )
            chain.append(at)
            at = stages[at].starts_from if stages[at].starts_from in stages else None
        order += reversed(chain)
    return order
