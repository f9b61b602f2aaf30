"""What every setting is made of: a dataclass in a table of options, and the one error a user is meant to read."""

from __future__ import annotations

import copy
import dataclasses
import math
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

Settings = TypeVar("Settings", bound=type)
AS_BEFORE = "as_before"  # in a field's metadata: the value with which everything is as it was without the field
OPTIONS: dict[tuple[str, str], type] = {}  # (group, name) -> dataclass; the command line hands them to Hydra


class UserError(Exception):
    """A mistake the user can mend: where it is, what is wrong, what to do. Printed as one line, exit code 2."""

    def __init__(self, where: str, what: str, remedy: str):
        super().__init__(where, what, remedy)
        self.where, self.what, self.remedy = where, what, remedy

    def __str__(self) -> str:
        # one dot at most is taken away: an ellipsis stays one
        return f"{self.where}: {self.what.removesuffix('.')}. {self.remedy.removesuffix('.')}."


def option(group: str, name: str) -> Callable[[Settings], Settings]:
    """Register a dataclass as the schema of option `name` of a configuration group."""

    def register(schema: Settings) -> Settings:
        if OPTIONS.setdefault((group, name), schema) is not schema:
            raise ValueError(f"{group}/{name} is registered twice: {OPTIONS[group, name]} and {schema}")
        return schema

    return register


def refuse_below(low: float, settings: Any, *names: str) -> None:
    """Refuse fields that are given and below `low`, or no finite numbers.

    Raises:
        ValueError: names the field first.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not low <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least {low:g}, is {value:g}")


def came_later(default: Any) -> Any:
    """A field added to settings in use: while it has its default, keys of artifacts stay what they were."""
    metadata = {AS_BEFORE: default}
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Buildable:
    """A setting that names the object it sets; the module is imported only when it is built."""

    implementation: ClassVar[str]  # "package.module:Name"

    def build(self, *parts: Any, **named: Any) -> Any:
        """The object that is set, made of this setting, of `parts` and of what is named; imports what it needs."""
        return pkgutil.resolve_name(self.implementation)(self, *parts, **named)
