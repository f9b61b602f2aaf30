"""What can be told of a run once its data is prepared, and before anything trains: rows that are too few, tokenizers
that are not the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_llm.pipeline.expand import Node
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.pipeline.rounds import typed_key
from lightning_llm.settings import UserError
from lightning_llm.stages.config import PruneSettings, TrainSettings
from lightning_llm.stages.context import model_directory

if TYPE_CHECKING:
    from lightning_llm.data.tokenizer import Tokenizer

OTHER_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
MODELS = ("model", "starts_from", "teacher_model", "reward_model")  # roles whose models read what a stage's data say


@dataclass(frozen=True)
class Prepared:
    """A plan of which the leading nodes, those that prepare, have been made."""

    recipe: Recipe
    nodes: Mapping[str, Node]  # all of the plan
    artifacts: Mapping[str, Path]  # of those that are there already
    tokenizers: dict[Path, Tokenizer] = field(default_factory=dict)  # that have been read

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
        own = self._tokenizer(node.inputs.get("tokenizer"))
        if own is None:
            return
        for role, source in node.inputs.items():
            if role.partition(".")[0] not in MODELS:
                continue
            place = self._tokenizer_of(source)
            other = self._tokenizer(place)
            if other is None and place is not None and place not in self.nodes:
                self._refuse_unknown_tokenizer(node, source, Path(place), own)
            if other is not None and other.fingerprint != own.fingerprint:
                where, named = self._named(node, source)
                part, remedy = "tokenizer", "Name a model with the same one"
                if other.ids_fingerprint == own.ids_fingerprint:
                    part, remedy = "chat template", f"{remedy}, or put the data's into its folder"
                theirs, ours = other.fingerprint[:8], own.fingerprint[:8]
                what = f"{named} has another {part} (sha {theirs}) than the data of {node.stage} (sha {ours})"
                if where.endswith(".learns_from"):
                    remedy += ", or take starts_from away: random weights take over their teacher's"
                raise UserError(where, what, remedy)

    def _refuse_unknown_tokenizer(self, node: Node, source: str, place: Path, own: Tokenizer) -> None:
        """Refuse a model of elsewhere that has its tokenizer in other files than we read, or too few ids. One that has
        none at all is trusted."""
        from lightning_llm.models.families import read_config  # knows torch

        directory = model_directory(place)
        where, named = self._named(node, source)
        if others := [name for name in OTHER_TOKENIZER_FILES if (directory / name).is_file()]:
            what = f"{named} has {others[0]} and no tokenizer.json, so that nobody can tell whether it reads these ids"
            raise UserError(where, what, "Load its tokenizer with transformers and save it there")
        if (ids := read_config(directory).vocab_size) < own.vocab_size:
            what = f"{named} knows {ids:,} ids, and the tokenizer of {node.stage} has {own.vocab_size:,}"
            raise UserError(where, what, "Name a model with the same tokenizer")

    def _named(self, node: Node, source: str) -> tuple[str, str]:
        """The setting that names an input of a node, as it is typed, and what it says."""
        stage = self.recipe.stages[node.stage]
        where, named = f"stages.{node.stage}", source
        for edge in stage.edges():
            if source in (edge.source, str(Path(edge.source).expanduser().resolve())):
                where, named = f"{where}.{edge.setting}", edge.source
                break
        return typed_key(where, self.recipe.rounds), named

    def _tokenizer_of(self, source: str) -> str | None:
        """The node, or the folder of elsewhere, with the tokenizer of a model."""
        while source in self.nodes:
            inputs = self.nodes[source].inputs
            if "tokenizer" in inputs:
                return inputs["tokenizer"]
            source = inputs.get("starts_from") or inputs.get("model.0") or ""
        return source or None

    def _tokenizer(self, place: str | None) -> Tokenizer | None:
        """None: there is none, or it has not been made yet."""
        if place is None:
            return None
        if place in self.nodes:
            made = self.artifacts.get(place)
            folder = None if made is None else made / "tokenizer"
        else:
            folder = model_directory(Path(place))
        if folder is None or not (folder / "tokenizer.json").is_file():
            return None
        if folder not in self.tokenizers:
            from lightning_llm.data.tokenizer import Tokenizer

            self.tokenizers[folder] = Tokenizer.load(folder)
        return self.tokenizers[folder]
