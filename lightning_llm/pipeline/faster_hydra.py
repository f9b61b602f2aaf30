"""Hydra's composition in half of its time: the same trees, without what it does again for every file of a tree.

Importing this exchanges three of Hydra's own functions (hydra-core 1.3, whose last release is of 2023). Recipes are made of
up to 150 files, and a command composes twice, a sweep three times for each of its jobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

of_hydra = defaults_list._create_interpolation_map
load_single = ConfigLoaderImpl._load_single_config
merge_one_by_one = ConfigLoaderImpl._compose_config_from_defaults_list


@dataclass
class Merged:
    """All files of a tree, in the place of one."""

    config: DictConfig


def interpolation_map(overrides: Any, files: list[Any], self_added: bool) -> DictConfig:
    """What a defaults list may refer to, only where one does."""
    refers = any(default.is_interpolation() for default in files)
    return of_hydra(overrides, files, self_added) if refers else OmegaConf.create()


def load_single_config(self: ConfigLoaderImpl, default: Any, repo: Any) -> Any:
    """One file; or all, merged already."""
    return default if isinstance(default, Merged) else load_single(self, default, repo)


def merge_at_once(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
    """All files in one merge: after each omegaconf goes through the whole tree."""
    merged = Merged(OmegaConf.create())
    try:
        with flag_override(merged.config, "no_deepcopy_set_nodes", True):
            merged.config.merge_with(*(self._load_single_config(each, repo).config for each in defaults))
    except OmegaConfBaseException:
        return merge_one_by_one(self, defaults, repo)  # says in which file the mistake is
    return merge_one_by_one(self, [merged], repo)  # pyright: ignore[reportArgumentType]


defaults_list._create_interpolation_map = interpolation_map
ConfigLoaderImpl._load_single_config = load_single_config
ConfigLoaderImpl._compose_config_from_defaults_list = merge_at_once
