"""YAML and overrides to one tree: where conf/ is, the schemas that Hydra checks it against, what the user has set.

This file and sweep.py are all that knows Hydra; recipe.py turns the tree into dataclasses.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.conf import HydraConf
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_llm.models.config import SIZES
from lightning_llm.pipeline import faster_hydra as faster_hydra  # for what it does
from lightning_llm.pipeline.mistakes import (
    COMMAND_LINE,
    as_user_error,
    file_of,
    in_hydras_words,
)
from lightning_llm.pipeline.names import unknown_entry, unknown_setting
from lightning_llm.settings import OPTIONS, UserError

PACKAGE = Path(__file__).parents[1]
CONF = next(p for p in (PACKAGE.parent / "conf", PACKAGE / "conf") if (p / "base.yaml").is_file())  # checkout, wheel
# packages with a config.py
SETTINGS = "merging models data optimization objectives evaluation training stages pipeline".split()

# By these figures of all stages a scale maps each of them, so it has to know the recipe's own where the user's stand.
RELATED = re.compile(
    r"(stages\.(?:\w+\.(?:stages|by_round)\.)?\w+\.(tokens|steps|context|batch_tokens|lr\.peak)"
    rf"|(stages\.\w+\.)?model\.({'|'.join(SIZES)}))(\.|$)"
)


@dataclass
class Composition:
    """A composed tree, and what of it the user has set."""

    verb: str
    config: DictConfig
    choices: dict[str, str | None] = field(default_factory=dict)  # group -> option
    overrides: list[str] = field(default_factory=list)
    pinned: frozenset[str] = frozenset()  # keys that the command line, an experiment or a sweep sets
    published: dict[str, Any] = field(default_factory=dict)  # what the recipe itself says for what is pinned
    loader: ConfigLoaderImpl | None = field(default=None, repr=False)

    @property
    def recipe(self) -> str | None:
        """The recipe's name: the option that was chosen."""
        return self.choices.get("recipe")

    def file_stating(self, key: str) -> str | None:
        """The YAML file that has the last word on `key`, a part of it, or what it is part of; none: no file does."""
        assert self.loader is not None
        repository = self.loader.repository
        defaults = self.loader.compute_defaults_list(self.verb, self.overrides, RunMode.RUN).defaults
        for default in reversed(defaults):
            path = default.config_path or ""
            loaded = None if path.startswith(("schema/", "hydra/")) else repository.load_config(path)
            values = OmegaConf.to_container(loaded.config) if loaded else {}
            if any(f"{leaf}.".startswith(f"{key}.") for leaf in _leaves(values, default.package or "")):
                return file_of(path, self.loader)
        return None


@functools.cache
def register_schemas() -> None:
    """Give Hydra every dataclass that is an option. In a group of their own, since no user chooses among them."""
    for package in SETTINGS:
        import_module(f"lightning_llm.{package}.config")
    for entry in metadata.entry_points(group="lightning_llm.settings"):  # options of other people's packages
        entry.load()
    for (group, name), schema in OPTIONS.items():
        ConfigStore.instance().store(group=f"schema/{group}", name=name, node=schema)


class Loader(ConfigLoaderImpl):
    """Hydra's loader, which also looks up what the files say of some keys, before it applies the overrides to them."""

    asked: frozenset[str] = frozenset()  # dotted keys
    answers: dict[str, Any]  # what the files of the tree composed last say for them

    def ask(self, verb: str, overrides: list[str]) -> None:
        """Ask for keys that the overrides set and a scale has to know; of an experiment's there is no telling yet."""
        keys = () if _chooses_experiment(overrides) else _user_keys(verb, overrides, self)
        self.asked, self.answers = frozenset(filter(RELATED.match, keys)), {}

    def _compose_config_from_defaults_list(self, defaults: list[Any], repo: Any) -> DictConfig:
        config = super()._compose_config_from_defaults_list(defaults, repo)
        self.answers = _selected(config, self.asked)
        return config


def build_loader(config_dir: str | Path | None = None) -> Loader:
    """Hydra's loader for our conf/ and the user's folder, beside whatever else Hydra does in this process.

    Raises:
        UserError: the folder does not exist, or has a file that one of ours of the same name would hide.
    """
    version.setbase("1.3")
    register_schemas()
    search_path = create_config_search_path(str(CONF))
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not folder.is_dir():
            raise UserError(
                "--config-dir", f"there is no folder {config_dir}", "Name the folder of your own YAML files"
            )
        _refuse_hidden(folder)
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return Loader(config_search_path=search_path)


def _refuse_hidden(folder: Path) -> None:
    if folder.resolve() == CONF.resolve():
        return
    for ours in CONF.glob("**/*.yaml"):  # not the user's folder, which may be a home
        if (file := folder / ours.relative_to(CONF)).is_file():
            what = "has the name of a file that comes with this program, which would be read in its place"
            raise UserError(str(file), what, "Give it another name, and choose it by that")


def compose_tree(
    verb: str,
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
    loader: ConfigLoaderImpl | None = None,
) -> Composition:
    """Compose what a verb is given.

    Args:
        overrides: as on the command line.
        config_dir: a folder of the user's own YAML files, searched besides ours.
        loader: instead of `config_dir`, one that is there already.

    Raises:
        UserError: the user's mistake, in one line.
    """
    overrides = list(overrides)
    loader = loader or build_loader(config_dir)
    try:
        if isinstance(loader, Loader):
            loader.ask(verb, overrides)
        config = loader.load_configuration(verb, overrides, run_mode=RunMode.RUN, from_shell=False)
    except Exception as error:
        if mistake := as_user_error(error, verb, loader, overrides):
            raise mistake from error
        if isinstance(error, ValueError | TypeError | AssertionError | AttributeError):
            raise in_hydras_words(error, verb, loader, overrides) from error
        raise
    return read_composition(verb, config, overrides, loader)


def read_composition(verb: str, config: DictConfig, overrides: list[str], loader: ConfigLoaderImpl) -> Composition:
    """What Hydra has composed, without Hydra's own settings."""
    _refuse_additions(overrides)
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return _with_origins(Composition(verb, config, choices, overrides), loader)


def job_composition(verb: str, config: DictConfig, loader: ConfigLoader) -> Composition:
    """The same of what Hydra hands to a job: the settings and its own apart."""
    own = HydraConfig.get()
    _refuse_additions(own.overrides.hydra)
    overrides = OmegaConf.to_container(own.overrides.task)
    composition = Composition(verb, config, dict(own.runtime.choices), overrides)  # pyright: ignore[reportArgumentType]
    return _with_origins(composition, loader)  # pyright: ignore[reportArgumentType]


def select_package(composition: Composition, package: str) -> Any:
    """A part of the tree by its dotted path; `_global_` is all of it.

    Raises:
        UserError: it is not there.
    """
    node: Any = composition.config
    path = ""
    for name in package.split(".") if package != "_global_" else ():
        known = list(map(str, node)) if isinstance(node, DictConfig) else []
        path = f"{path}.{name}".lstrip(".")
        if name not in known:
            raise unknown_entry(path, known, "--package")
        node = node[name]
    return node


def _refuse_additions(overrides: Sequence[str]) -> None:
    """Refuse `+hydra.<key>=...` for what is none of Hydra's own settings."""
    for override in overrides:
        if override.startswith(("+hydra.", "++hydra.")):
            path, *names = override.lstrip("+").partition("=")[0].split(".")
            schema: Any = HydraConf
            for name in names:
                if not dataclasses.is_dataclass(schema):
                    break
                path += f".{name}"
                if name not in {f.name for f in dataclasses.fields(schema)}:
                    raise unknown_setting(path, schema, COMMAND_LINE)  # pyright: ignore[reportArgumentType]
                schema = typing.get_type_hints(schema)[name]


def _with_origins(composition: Composition, loader: ConfigLoaderImpl) -> Composition:
    verb, overrides, composition.loader = composition.verb, composition.overrides, loader
    composition.pinned = frozenset(_user_keys(verb, overrides, loader))
    related = {key for key in composition.pinned if RELATED.match(key)}
    related -= {f"{stage}.lr.peak" for stage in _added_stages(overrides)}  # no report's: a schedule's default is none
    if isinstance(loader, Loader) and related <= loader.answers.keys():
        composition.published = {key: loader.answers[key] for key in related}
    elif related:
        composition.published = _published(verb, overrides, loader, related)
    return composition


def _user_keys(verb: str, overrides: list[str], loader: ConfigLoaderImpl) -> set[str]:
    """Dotted keys of every value that the overrides and the chosen experiment state."""
    keys: set[str] = set()
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if override.package is not None or override.is_hydra_override() or loader.repository.group_exists(key):
            continue
        keys.update(_leaves(override.value(), key))
    for default in _experiment_files(verb, overrides, loader):
        loaded = loader.repository.load_config(default.config_path)
        values = OmegaConf.to_container(loaded.config) if loaded else {}
        keys.update(_leaves(values, default.package or ""))
    return {key for key in keys if key.split(".")[0] not in ("hydra", "defaults")}


def _added_stages(overrides: list[str]) -> set[str]:
    """stages.NAME of every stage that an override adds to the recipe."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {
        override.package
        for override in parsed
        if override.is_add() and override.key_or_group == "stage" and override.package
    }


def _leaves(value: Any, key: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield key
        return
    for name, part in value.items():
        yield from _leaves(part, f"{key}.{name}" if key else str(name))


def _chooses_experiment(overrides: list[str]) -> bool:
    return any(override.lstrip("+").startswith("experiment") for override in overrides)


def _experiment_files(verb: str, overrides: list[str], loader: ConfigLoaderImpl) -> list[Any]:
    if not _chooses_experiment(overrides):
        return []
    defaults = loader.compute_defaults_list(verb, overrides, RunMode.RUN).defaults
    return [default for default in defaults if (default.config_path or "").startswith("experiment/")]


def _published(verb: str, overrides: list[str], loader: ConfigLoaderImpl, keys: set[str]) -> dict[str, Any]:
    """What the files say for `keys` where neither an override nor an experiment comes in between.

    The same files are merged again without the last two.
    """
    defaults, repository = loader.compute_defaults_list(verb, overrides, RunMode.RUN).defaults, loader.repository
    files = [default for default in defaults if not (default.config_path or "").startswith("experiment/")]
    return _selected(loader._compose_config_from_defaults_list(files, repository), keys)


def _selected(config: DictConfig, keys: Iterable[str]) -> dict[str, Any]:
    """Key -> its value, or None where there is none."""
    values = {key: OmegaConf.select(config, key, default=None) for key in keys}
    return {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in values.items()
    }
