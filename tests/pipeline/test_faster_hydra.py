"""What is exchanged of Hydra composes the same trees."""

import pytest
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from lightning_llm.pipeline import faster_hydra
from lightning_llm.pipeline.composition import compose_tree


@pytest.mark.parametrize(
    "words",
    [["recipe=qwen2", "scale=paper", "seed=3"], ["recipe=itec"], ["recipe=warp", "experiment=warp_front"]],
    ids=lambda words: words[0],
)
def test_trees_are_hydras_own(words, monkeypatch):
    found = compose_tree("plan", words)
    monkeypatch.setattr(defaults_list, "_create_interpolation_map", faster_hydra.of_hydra)
    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", faster_hydra.merge_one_by_one)
    expected = compose_tree("plan", words)
    assert OmegaConf.to_yaml(found.config) == OmegaConf.to_yaml(expected.config)
    assert (found.choices, found.published, found.pinned) == (expected.choices, expected.published, expected.pinned)
