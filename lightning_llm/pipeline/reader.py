"""A composed tree as the dataclasses of a verb, every key of it checked against its field."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_llm.models.config import ModelConfig, check_values
from lightning_llm.pipeline.mappings import known_entries
from lightning_llm.pipeline.mistakes import COMMAND_LINE, file_of, groups
from lightning_llm.pipeline.names import name_nearest, refused_by, unknown_entry, unknown_setting, without_schema
from lightning_llm.settings import OPTIONS, Buildable, UserError

if TYPE_CHECKING:
    from lightning_llm.pipeline.composition import Composition


def build_settings(composition: Composition) -> Any:
    """The dataclass of a verb, every key checked against its field.

    Raises:
        UserError: no recipe is chosen, an unknown or missing key, a reference to nothing, a value that is refused.
    """
    reader = _Reader(composition)
    reader.refuse_unknown(composition.config, "")
    if "stages" in composition.config and composition.recipe is None:
        from lightning_llm.pipeline.composition import CONF

        known = ", ".join(sorted(path.stem for path in (CONF / "recipe").glob("*.yaml")))
        raise UserError("recipe", "none is chosen", f"Give recipe=NAME; known: {known}")
    try:
        return reader.build(composition.config, "")
    except OmegaConfBaseException as error:
        first = str(error).split("\n")[0]
        raise UserError(str(error.full_key or composition.verb), first, "Refer to a key that is there") from error


def refuse_unknown_keys(composition: Composition) -> None:
    """Refuse every key that is no field of its dataclass. `+key=...` and YAML under an untyped node get past Hydra's
    schemas; nothing gets past this.

    Raises:
        UserError: names the key and the nearest valid one.
    """
    _Reader(composition).refuse_unknown(composition.config, "")


class _Reader:
    """Walks the tree: first over the keys, then over the values."""

    def __init__(self, composition: Composition):
        self.composition = composition

    def refuse_unknown(self, node: Any, path: str) -> None:
        """Raises UserError for the first key below `path` that is no field and no known entry."""
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
            return
        schema = OmegaConf.get_type(node)
        known = self._known_entries(path)
        if isinstance(schema, type) and dataclasses.is_dataclass(schema):
            known = [f.name for f in dataclasses.fields(schema)]
        for name in map(str, node._content):  # pyright: ignore[reportArgumentType, reportCallIssue]
            key = _join(path, name)
            if known is not None and name not in known:
                if dataclasses.is_dataclass(schema):
                    raise unknown_setting(key, schema, self._origin(key))  # pyright: ignore[reportArgumentType]
                raise unknown_entry(key, known, self._origin(key))
            self.refuse_unknown(node._get_node(name), key)

    def _known_entries(self, path: str) -> Sequence[str] | None:
        """The keys of a mapping that is no dataclass, where they are not free."""
        if path == "model.published":  # a figure is known if something refers to it, or a model of ours states it
            texts = _texts(self.composition.config)
            named = {name for text in texts for name in re.findall(r"\$\{model\.published\.(\w+)\}", text)}
            return sorted(named | _figures_of_our_models())
        return known_entries(path)

    def build(self, node: Any, path: str) -> Any:
        """The value at a dotted path: dataclasses of dataclasses, lists and plain values.

        Raises:
            UserError: a value is missing, taken away or refused by its dataclass.
        """
        if isinstance(node, ListConfig):
            return [self.build(node[i], f"{path}[{i}]") for i in range(len(node))]
        if isinstance(node, float) and not math.isfinite(node):
            origin = self._origin(re.sub(r"\[\d+\].*", "", path))
            raise UserError(origin, f"{path} is {node}, which is not finite", "Give it a number")
        if not isinstance(node, DictConfig):
            return node
        if node._is_none():
            return None
        schema = OmegaConf.get_type(node)
        if not (isinstance(schema, type) and dataclasses.is_dataclass(schema)):
            entries = {str(name): self.build(node[name], _join(path, name)) for name in node}
            if path != "stages":
                return entries
            self._refuse_chosen([name for name, stage in entries.items() if stage is None])
            return {name: stage for name, stage in entries.items() if stage is not None}  # null leaves a stage out
        if issubclass(schema, Buildable) and not hasattr(schema, "implementation"):
            file = self._file_chosen(path)
            if file or not OmegaConf.is_missing(node, "name"):
                raise without_schema(path, schema, file or self._origin(path))
        hints = typing.get_type_hints(schema)
        values = {}
        for name in (f.name for f in dataclasses.fields(schema)):
            key = _join(path, name)
            if OmegaConf.is_missing(node, name):
                raise self._missing(key)
            if name not in node:
                raise UserError(self._origin(key), f"{key} cannot be taken away", "Give it a value instead")
            value = self.build(node[name], key)
            values[name] = tuple(value) if typing.get_origin(hints[name]) is tuple else value
        if issubclass(schema, Buildable):
            self._refuse_other_name(path, schema, values["name"])
        if (
            schema is ModelConfig
        ):  # a shape of the user's need not go with the published one, only with the scale's: `scaled`
            model = object.__new__(schema)
            vars(model).update(values)
            try:
                check_values(model)
            except ValueError as error:
                name, _, fact = str(error).partition(" ")
                raise UserError(f"{path}.{name}", fact, "Mend it, or leave it out: the model has its own") from error
            return model
        try:
            return schema(**values)
        except ValueError as error:
            refused = refused_by(schema, path, error)
            key, fact, _ = refused.args
            if (stated := self._stated_at(key)) != key:
                raise UserError(stated, f"{fact}, which {key} takes over", "Give it another value") from error
            raise refused from error

    def _stated_at(self, key: str) -> str:
        """The setting that states a value: another one where a file says `${...}` of it."""
        place, _, name = key.rpartition(".")
        holder = OmegaConf.select(self.composition.config, place) if place else self.composition.config
        node = holder._get_node(name) if isinstance(holder, DictConfig) else None
        reference = re.fullmatch(r"\$\{([\w.]+)\}", str(node._value())) if node is not None else None
        return self._stated_at(reference[1]) if reference else key

    def _refuse_chosen(self, absent: Sequence[str]) -> None:
        """An option of conf/stage/ that the user chooses for a stage which the recipe leaves out would do nothing."""
        for name in absent:
            group = f"stage@stages.{name}"
            if any(word.lstrip("+").startswith(f"{group}=") for word in self.composition.overrides):
                what = f"chooses {group}, and stages.{name} is null in {self._origin(f'stages.{name}')}"
                raise UserError(COMMAND_LINE, what, "Give the stage a name of its own: +stage@stages.NAME=...")

    def _missing(self, key: str) -> UserError:
        if key.startswith("stages."):
            _, stage, *_ = key.split(".")
            others = [name for name in self.composition.config.stages if name != stage]
            return UserError(
                self._origin(f"stages.{stage}"),
                f"stages.{stage} has no {key.split('.', 2)[2].removesuffix('.name')}",
                f"{name_nearest(stage, others)}; a new one begins with an option of conf/stage/",
            )
        group, _, name = key.rpartition(".")
        if name == "name" and self.composition.loader and group in groups(self.composition.loader):
            return UserError(group, "nothing is chosen", f"Give {group}=NAME, or choose one in the defaults of a file")
        return UserError(key, "has no value", f"Give {key}=..., or choose an option of the group")

    def _refuse_other_name(self, path: str, schema: type, name: str) -> None:
        """`objective.name=dpo` would train what it trained before, and call it dpo."""
        for (group, option), settings in OPTIONS.items():
            if settings is schema and OPTIONS.get((group, name), schema) is not schema:
                what = f"{path}.name is {name}, and the settings are those of {option}"
                raise UserError(self._origin(f"{path}.name"), what, f"Choose with {group}@{path}={name}")

    def _file_chosen(self, path: str) -> str | None:
        """The file that an option of a group, as `optimizer@stages.sft.optimizer=mine`, brings to a path."""
        for place, option in self.composition.choices.items():
            group, at, package = place.partition("@")
            if at and package == path:
                return file_of(f"{group}/{option}", self.composition.loader)
        return None

    def _origin(self, key: str) -> str:
        """Where a key comes from: the command line if the user has set it or what it is part of, else its file."""
        if any(key == pin or key.startswith(pin + ".") or pin.startswith(key + ".") for pin in self.composition.pinned):
            return COMMAND_LINE
        return self.composition.file_stating(key) or self.composition.verb


def _texts(node: Any) -> Iterator[str]:
    """All texts of a tree as they are written: what refers to another key is one."""
    content = node._content if isinstance(node, DictConfig | ListConfig) else node._value()
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _texts(part)


@functools.cache
def _figures_of_our_models() -> frozenset[str]:
    """All that a file in conf/model/ states under `published:`."""
    from lightning_llm.pipeline.composition import CONF

    texts = (path.read_text("utf-8").partition("\npublished:")[2] for path in (CONF / "model").glob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"^  (\w+):", text, re.MULTILINE))


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)
