"""Where the models of a recipe come from: the stage or the folder that each begins with, its shape, its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_llm.models.config import ModelConfig
from lightning_llm.pipeline.order import trained_behind
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.stages.config import MergeStage, PruneStage, TrainStage, UpcycleStage
from lightning_llm.stages.context import model_directory


class Lineage:
    """Of one recipe. A model is a stage's, by its name, or of elsewhere, by its folder."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.shapes: dict[str, ModelConfig] = {}  # of the stages that are expanded so far

    def source(self, starts_from: str) -> str:
        """A node's input for a model: the stage's name, or the whole path of a model of elsewhere."""
        return starts_from if starts_from in self.recipe.stages else str(Path(starts_from).expanduser().resolve())

    def root(self, model: str, user: str = "") -> tuple[str, str | None]:
        """The stage where a model's line begins, and the model of elsewhere that it begins from.

        Args:
            model: a training stage, or a model of elsewhere that the stage `user` names.
        """
        stage = self.recipe.stages.get(model)
        if stage is None:
            return user, model
        if isinstance(stage, MergeStage):
            return self.root(stage.models[0], model)
        if isinstance(stage, PruneStage | UpcycleStage):
            return self.root(stage.starts_from or "", model)
        assert isinstance(stage, TrainStage), "checked by order_of_stages"
        if stage.starts_from is not None:
            return self.root(stage.starts_from, model)
        if stage.learns_from is not None:  # random weights speak as the teacher does
            root, outside = self.root(stage.learns_from, model)
            return (model if outside is not None else root), outside
        return model, None

    def shared(self, model: str, user: str = "") -> tuple[str, str]:
        """Names of the tokenizer and of the held-out data that go with a model."""
        root, outside = self.root(model, user)
        return ("tokenizer", "evaluation.prepare") if outside is None else (f"{root}.tokenizer", f"{root}.evaluation")

    def shape(self, model: str) -> ModelConfig:
        """Of a stage's model once it is in `shapes`, or of one of elsewhere."""
        if model in self.shapes:
            return self.shapes[model]
        from lightning_llm.models.families import read_config  # knows torch: only models of elsewhere cost it

        return read_config(model_directory(Path(self.source(model))))

    def own_shape(self, stage: TrainStage) -> ModelConfig:
        """Of random weights: the stage's or the recipe's model, with the vocabulary of a teacher of elsewhere."""
        model = stage.model or self.recipe.model
        outside = None if stage.learns_from is None else self.root(stage.learns_from, "")[1]
        if outside is None or self.recipe.is_pinned("model.vocab_size"):
            return model
        return replace(model, vocab_size=self.shape(outside).vocab_size)

    def scores(self, model: str) -> bool:
        """Whether it is a reward model."""
        if (trained := trained_behind(model, self.recipe.stages)) is not None:
            return self.recipe.stages[trained].objective.is_scored  # pyright: ignore[reportAttributeAccessIssue]
        from lightning_llm.models.families import CLASSIFIER, read_head

        outside = self.root(model)[1] if model in self.recipe.stages else model
        return read_head(model_directory(Path(self.source(outside or "")))) == CLASSIFIER
