"""A composed tree as a Recipe of dataclasses, with every key known and every edge checked.

What comes out is plain Python, and nobody downstream asks upstream a question.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_llm.data.config import TokenizerConfig
from lightning_llm.evaluation.config import EvaluationConfig
from lightning_llm.models.config import ModelConfig
from lightning_llm.pipeline.checks import LENGTHS, WARMUPS, check, check_rounds
from lightning_llm.pipeline.config import LimitsConfig, RecipeSettings, ScaleConfig, StoreConfig
from lightning_llm.pipeline.order import order_of_stages, unasked
from lightning_llm.pipeline.reader import build_settings
from lightning_llm.pipeline.rounds import (
    published_in_round,
    refuse_twice,
    stages_of_rounds,
    typed_key,
    unrolled,
    unrolled_keys,
)
from lightning_llm.settings import UserError
from lightning_llm.stages.config import ComputeConfig, StageConfig, TrainStage
from lightning_llm.training.config import LoggerConfig

if TYPE_CHECKING:
    from lightning_llm.pipeline.composition import Composition


@dataclass(frozen=True)
class Recipe:
    """A graph of stages with all that it takes to run it. Made by `compose`, mapped by `scaled`, never changed."""

    name: str
    model: ModelConfig
    tokenizer: TokenizerConfig
    stages: dict[str, StageConfig]
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
    rounds: dict[str, tuple[str, ...]] = field(default_factory=dict)  # parts that are repeated -> stages inside

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
    own = {"name", "overrides", "pinned", "published", "is_scaled", "rounds"}
    names = {f.name for f in dataclasses.fields(Recipe)} - own
    given = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    recipe = Recipe(
        composition.recipe,
        overrides=tuple(composition.overrides),
        pinned=composition.pinned,
        published=composition.published,
        **given,
    )
    recipe = dataclasses.replace(recipe, rounds=stages_of_rounds(recipe.stages))
    try:
        recipe = _without_unasked(_unrolled(recipe))
        check(recipe)
    except UserError as error:  # rounds have names of their own, and their settings are typed once for all of them
        raise UserError(*(typed_key(part, recipe.rounds) for part in error.args)) from error
    return recipe


def _unrolled(recipe: Recipe) -> Recipe:
    """Rounds as stages; what is pinned in one is pinned in all."""
    check_rounds(recipe.stages)
    refuse_twice(recipe.pinned, recipe.stages)
    recipe = dataclasses.replace(
        recipe,
        stages=unrolled(recipe.stages),
        pinned=frozenset(unrolled_keys(recipe.pinned, recipe.stages)),
        published={
            key: published_in_round(typed, recipe.published[typed], turn, recipe.stages)
            for key, (typed, turn) in unrolled_keys(recipe.published, recipe.stages).items()
        },
    )
    stages = {name: _one_length(recipe, name, stage) for name, stage in recipe.stages.items()}
    return dataclasses.replace(recipe, stages=stages)


def _without_unasked(recipe: Recipe) -> Recipe:
    """The recipe without the optional stages that nobody asks for; what the user says of one is for nothing then."""
    if absent := unasked(recipe.stages):
        order_of_stages(recipe.stages)  # a name that is misspelt asks for nobody: it is said while all are there
    for name in absent:
        own = f"stages.{name}."
        if given := sorted(key for key in recipe.pinned if key.startswith(own) and key != f"{own}optional"):
            what = f"is given, and {name} is left out: no stage is made from it"
            raise UserError(given[0], what, f"Name it, as in judged_by=[{name}], or set stages.{name}.optional=false")
    return dataclasses.replace(recipe, stages={n: stage for n, stage in recipe.stages.items() if n not in absent})


def _one_length(recipe: Recipe, name: str, stage: StageConfig) -> StageConfig:
    """A length or a warm-up that the user gives takes the place of the recipe's own, in whatever unit that is."""
    if not isinstance(stage, TrainStage):
        return stage

    def winner(config: Any, key: str, units: Sequence[str]) -> dict[str, None]:
        given = [unit for unit in units if f"{key}.{unit}" in recipe.pinned and getattr(config, unit) is not None]
        return dict.fromkeys(set(units) - set(given)) if len(given) == 1 else {}

    lr = dataclasses.replace(stage.lr, **winner(stage.lr, f"stages.{name}.lr", WARMUPS))
    return dataclasses.replace(stage, lr=lr, **winner(stage, f"stages.{name}", LENGTHS))
