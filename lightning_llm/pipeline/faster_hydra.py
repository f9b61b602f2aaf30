"""Hydra's composition in half of its time: the same trees, without what Hydra does again for every file of a tree.

Importing this exchanges three of Hydra's own functions (hydra-core 1.3, whose last release is of 2023). Recipes are
made of up to 150 files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException
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
ConfigLoaderImpl._load_single_config = load_single_config
ConfigLoaderImpl._compose_config_from_defaults_list = merge_at_once
