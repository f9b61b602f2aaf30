"""What can be told of a run once its data is prepared, and before anything trains: rows that are too few, tokenizers
that are not the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_llm.pipeline.expand import Node
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.pipeline.rounds import typed_key
from lightning_llm.settings import UserError
from lightning_llm.stages.config import PruneSettings, TrainSettings
from lightning_llm.stages.context import model_directory

MODELS = ("model", "starts_from", "teacher_model", "reward_model")  # roles whose models read what a stage's data say


@dataclass(frozen=True)
class Prepared:
    """A plan of which the leading nodes, those that prepare, have been made."""

    recipe: Recipe
    nodes: Mapping[str, Node]  # all of the plan
    artifacts: Mapping[str, Path]  # of those that are there already
    fingerprints: dict[Path, str] = field(default_factory=dict)  # of tokenizers that have been read

    def refuse(self, node: Node) -> None:
        """Refuse a node that could not be made as it is planned.

        Raises:
            UserError: says why, in the words of the stage.
        """
        self.refuse_other_tokenizers(node)
        self.refuse_few_rows(node)

    def refuse_few_rows(self, node: Node) -> None:
        """Refuse a node that would see its data more often than it may; data that stages make are not known yet.

        Raises:
            UserError: names the source, in the words of the stage.
        """
        settings, prepared = node.settings, self.artifacts.get(node.inputs.get("data", ""))
        if prepared is None:
            return
        if isinstance(settings, TrainSettings) and settings.rollout is None:
            context, batch = settings.context, settings.batch_tokens
        elif isinstance(settings, PruneSettings):
            context, batch = settings.context, settings.tokens
        else:
            return
        from lightning_llm.data.packing import StageData  # knows torch

        StageData(
            prepared,
            settings.data,
            context_ramp=context,
            batch_ramp=batch,
            total_tokens=settings.tokens,
            seed=settings.seed,
        )

    def refuse_other_tokenizers(self, node: Node) -> None:
        """Refuse models, of elsewhere or of another line of stages, that do not read the tokens of the node's data.

        Raises:
            UserError: names the setting that names the model.
        """
        own = self._fingerprint(node.inputs.get("tokenizer"))
        if own is None:
            return
        for role, source in node.inputs.items():
            if role.partition(".")[0] not in MODELS:
                continue
            other = self._fingerprint(self._tokenizer_of(source))
            if other is not None and other != own:
                where, named = self._named(node, source)
                what = f"{named} has another tokenizer (sha {other[:8]}) than the data of {node.stage} (sha {own[:8]})"
                remedy = "Name a model with the same one"
                if where.endswith(".learns_from"):
                    remedy += ", or take starts_from away: random weights take over their teacher's"
                raise UserError(typed_key(where, self.recipe.rounds), what, remedy)

    def _named(self, node: Node, source: str) -> tuple[str, str]:
        """The setting that names an input of a node, and what it says."""
        stage = self.recipe.stages[node.stage]
        for edge in stage.edges():
            if source in (edge.source, str(Path(edge.source).expanduser().resolve())):
                return f"stages.{node.stage}.{edge.setting}", edge.source
        return f"stages.{node.stage}", source

    def _tokenizer_of(self, source: str) -> str | None:
        """The node, or the folder of elsewhere, with the tokenizer of a model."""
        while source in self.nodes:
            inputs = self.nodes[source].inputs
            if "tokenizer" in inputs:
                return inputs["tokenizer"]
            source = inputs.get("starts_from") or inputs.get("model.0") or ""
        return source or None

    def _fingerprint(self, tokenizer: str | None) -> str | None:
        """None: there is none, or it has not been made yet."""
        if tokenizer is None:
            return None
        if tokenizer in self.nodes:
            made = self.artifacts.get(tokenizer)
            folder = None if made is None else made / "tokenizer"
        else:
            folder = model_directory(Path(tokenizer))
        if folder is None or not (folder / "tokenizer.json").is_file():
            return None
        if folder not in self.fingerprints:
            from lightning_llm.data.tokenizer import Tokenizer

            self.fingerprints[folder] = Tokenizer.load(folder).fingerprint
        return self.fingerprints[folder]
