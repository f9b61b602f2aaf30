"""What is exchanged of Hydra composes the same trees."""

import pytest
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from omegaconf import OmegaConf

from lightning_llm.pipeline import faster_hydra
from lightning_llm.pipeline.composition import compose_tree
from lightning_llm.settings import UserError


@pytest.mark.parametrize(
    "words",
    [["recipe=qwen2", "scale=paper", "seed=3"], ["recipe=itec"], ["recipe=warp", "experiment=warp_front"]],
    ids=lambda words: words[0],
)
def test_trees_are_hydras_own(words, monkeypatch):
    faster_hydra.trees.clear()
    found, again = compose_tree("plan", words), compose_tree("plan", words)
    assert again.config is not found.config
    assert again.config == found.config
    monkeypatch.setattr(defaults_list, "_create_interpolation_map", faster_hydra.of_hydra)
    monkeypatch.setattr(ConfigRepository, "load_config", faster_hydra.load_anew)
    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", faster_hydra.merge_one_by_one)
    expected = compose_tree("plan", words)
    assert OmegaConf.to_yaml(found.config) == OmegaConf.to_yaml(expected.config)
    assert (found.choices, found.published, found.pinned) == (expected.choices, expected.published, expected.pinned)


def test_a_tree_is_merged_once_for_all_that_is_typed(monkeypatch):
    faster_hydra.trees.clear()
    first = compose_tree("run", ["recipe=qwen2", "seed=3", "stages.sft.examples=7"])
    monkeypatch.setattr(faster_hydra, "merged", None)  # which nobody calls from here on
    other = compose_tree("run", ["recipe=qwen2", "scale.context=64"])
    assert (first.config.seed, first.config.stages.sft.examples) == (3, 7)
    assert (other.config.seed, other.config.scale.context) == (0, 64)
    assert other.config.stages.sft.examples != 7


def test_a_file_that_changes_is_read_again(tmp_path):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "mine.yaml"
    file.write_text("defaults: [qwen2_0_5b, _self_]\nhidden_size: 896\n")
    words = ["recipe=qwen2", "model=mine", "scale=paper"]
    assert compose_tree("run", words, tmp_path).config.model.hidden_size == 896
    file.write_text("defaults: [qwen2_0_5b, _self_]\nhidden_size: 1792\n")
    assert compose_tree("run", words, tmp_path).config.model.hidden_size == 1792
    file.unlink()
    with pytest.raises(UserError, match="mine"):
        compose_tree("run", words, tmp_path)


def test_few_trees_are_kept(monkeypatch):
    monkeypatch.setattr(faster_hydra, "TREES", 2)
    for scale in ("nano", "small", "paper"):
        compose_tree("run", ["recipe=upcycling", f"scale={scale}"])
    assert len(faster_hydra.trees) == 2
