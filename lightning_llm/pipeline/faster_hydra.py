"""Hydra's composition in half of its time, and in a sixth where the same files are composed again, as in a sweep.

The trees are the same; left out is what Hydra does again for every file of a tree, and what it has done in this process
before. Importing this exchanges four of Hydra's own functions (hydra-core 1.3, whose last release is of 2023). Recipes
are made of up to 150 files.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

TREES = 8  # that are kept, each of some megabytes

of_hydra = defaults_list._create_interpolation_map
load_anew = ConfigRepository.load_config
load_single = ConfigLoaderImpl._load_single_config
merge_one_by_one = ConfigLoaderImpl._compose_config_from_defaults_list

files: dict[Hashable, tuple[Any, ConfigResult]] = {}  # state of a file -> what is of that state, and what it holds
trees: OrderedDict[Hashable, tuple[list[ConfigResult], DictConfig]] = OrderedDict()  # its files -> them, and the tree


@dataclass
class Merged:
    """All files of a tree, in the place of one."""

    config: DictConfig


def interpolation_map(overrides: Any, files: list[Any], self_added: bool) -> DictConfig:
    """What a defaults list may refer to, only where one does."""
    refers = any(default.is_interpolation() for default in files)
    return of_hydra(overrides, files, self_added) if refers else OmegaConf.create()


def load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    """A file as it was read before, if it has not changed since."""
    source = self._find_object_source(config_path, ObjectType.CONFIG)
    state, of = state_of(source, config_path)
    if state is None:
        return load_anew(self, config_path)
    if state not in files and (found := load_anew(self, config_path)) is not None:
        files[state] = of, found
    return files[state][1]


def state_of(source: ConfigSource | None, config_path: str) -> tuple[Hashable | None, Any]:
    """What tells a file from all others, and from itself before it was changed; and what has to live for that to be so.

    None: of this source there is no telling.
    """
    if source is None:
        return None, None
    place = source.scheme(), source.provider, source.path, config_path
    name = source._normalize_file_name(config_path)
    match source.scheme():
        case "file":
            now = os.stat(os.path.join(source.path, name))
            return (*place, now.st_ino, now.st_mtime_ns, now.st_ctime_ns, now.st_size), None
        case "structured":
            node = ConfigStore.instance()._load(name)  # the source has a copy of the store
            return (*place, id(node)), node
        case "pkg":  # an installed package's
            return place, None
        case _:
            return None, None


def load_single_config(self: ConfigLoaderImpl, default: Any, repo: Any) -> Any:
    """One file, to be merged with others, which changes it; or all, merged already."""
    if isinstance(default, Merged):
        return default
    found = load_single(self, default, repo)
    is_as_read = found.config is repo.load_config(config_path=default.config_path).config  # put in no package
    return replace(found, config=copy.deepcopy(found.config)) if is_as_read else found


def merge_at_once(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
    """A copy of the tree of these files: merged now, or before."""
    loaded = [repo.load_config(config_path=default.config_path) for default in defaults]
    key = tuple(
        (id(file), default.config_path, default.package, default.is_self, default.primary)
        for file, default in zip(loaded, defaults, strict=True)
    )
    if key not in trees:
        trees[key] = loaded, merged(self, defaults, repo)
    trees.move_to_end(key)
    while len(trees) > TREES:
        trees.popitem(last=False)
    return copy.deepcopy(trees[key][1])


def merged(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
    """Files one after the other, and what is whose part is gone through once behind the last: omegaconf does so after
    each."""
    config = OmegaConf.create()
    vars(config)["_re_parent"] = lambda: None  # in the place of the method
    with flag_override(config, "no_deepcopy_set_nodes", True):
        for default in defaults:
            try:
                config.merge_with(self._load_single_config(default, repo).config)
            except OmegaConfBaseException as error:
                says = f"{type(error).__name__} raised while composing config:\n{error}"
                raise ConfigCompositionException(f"In '{default.config_path}': {says}") from error
    del vars(config)["_re_parent"]
    config._re_parent()
    return merge_one_by_one(self, [Merged(config)], repo)  # pyright: ignore[reportArgumentType]


defaults_list._create_interpolation_map = interpolation_map
ConfigRepository.load_config = load_config
ConfigLoaderImpl._load_single_config = load_single_config
ConfigLoaderImpl._compose_config_from_defaults_list = merge_at_once
