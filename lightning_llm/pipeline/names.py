"""Names that are none: what the user may have meant, and what a setting is called and takes."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_llm.pipeline.mappings import known_entries
from lightning_llm.settings import OPTIONS, UserError

MOST_LISTED = 8  # names of settings, where all that are there are given


def unknown_setting(key: str, schema: type, where: str, more: Iterable[str] = ()) -> UserError:
    """`key` ends in a name that is no field of `schema`; the remedy is the nearest one, or one of that name below it.

    Args:
        more: names that are right there too, as groups beside the settings of a verb.
    """
    name = key.rsplit(".", 1)[-1]
    prefix = key.rsplit(".", 1)[0] + "." if "." in key else ""
    what = f"{key} is not a setting of {schema_name(schema)}"
    known = [f.name for f in dataclasses.fields(schema)]
    below = next((path for path in _paths(schema) if path.endswith(f".{name}")), None)
    if below is not None:
        return UserError(where, what, f"The nearest is {prefix}{below}")
    verbs = [verb for (group, verb), other in OPTIONS.items() if group == "verb" and has_field(other, name)]
    if verbs and schema in (option for (group, _), option in OPTIONS.items() if group == "verb"):
        return UserError(where, what, f"It belongs to {listed(verbs)}")
    kinds = subclasses(schema)
    if owners := [kind for kind in kinds if has_field(kind, name)]:  # a file of the user's own that names no schema
        options = " or ".join(map(schema_name, owners))
        return UserError(
            where,
            what,
            f"It is one of {options}: begin the file with its defaults, as [{schema_name(owners[0])}, _self_]",
        )
    if name in more:
        return UserError(where, f"{key} chooses a file", f"Give {key}=NAME")
    near = nearest(name, [*known, *more])
    if near in known:
        return UserError(where, what, f"The nearest is {near} ({describe(schema, near)})")
    for kind in kinds if near is None else ():
        if close := nearest(name, [f.name for f in dataclasses.fields(kind)]):
            begin = f"begin the file with the defaults [{schema_name(kind)}, _self_]"
            return UserError(where, what, f"The nearest is {close} of {schema_name(kind)}: {begin}")
    return UserError(where, what, f"The nearest is {near}" if near else f"Known: {', '.join(known)}")


def listed(words: Sequence[str]) -> str:
    """`a, b and c`"""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def has_field(schema: type, name: str) -> bool:
    """Whether a dataclass has a field of this name."""
    return any(f.name == name for f in dataclasses.fields(schema))


def unknown_entry(key: str, known: Sequence[str], where: str) -> UserError:
    """`key` ends in a name that is no entry of an open mapping."""
    parent, _, name = key.rpartition(".")
    return UserError(where, f"{key} is not there" if parent else f"there is no {key}", name_nearest(name, known))


def new_entry(key: str, typed: str, where: str) -> UserError:
    """`key` is not in an open mapping yet: misspelt, or typed without the plus that Hydra wants before new keys."""
    path, _, name = key.rpartition(".")
    known = known_entries(path)
    if known is not None and name not in known:
        return unknown_entry(key, known, where)
    return UserError(
        where, f"{key} is not there yet", f"Type {shlex.quote('+' + typed)}, with a plus before what is new"
    )


def name_nearest(name: str, known: Sequence[str]) -> str:
    """The remedy for a name that is none of `known`."""
    near = nearest(name, known)
    others = f"known: {', '.join(sorted(known))}" if known else "there are none"
    return f"The nearest is {near} ({others})" if near else others[0].upper() + others[1:]


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The name out of `known` that is spelt most alike, if any comes near."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def without_schema(path: str, schema: type, where: str) -> UserError:
    """A file of the user's own has chosen no kind: `schema` is what all kinds have in common, and builds nothing."""
    kinds = [schema_name(kind) for kind in subclasses(schema)]
    remedy = f"Begin the file with the defaults of one of {', '.join(kinds)}, as [{kinds[0]}, _self_]"
    return UserError(where, f"{path} is {schema_name(schema)} of no kind", remedy)


def refused_by(schema: type, path: str, error: ValueError) -> UserError:
    """What a dataclass says of a value of its own, under the key of that value: its message begins with the field's
    name, or with a path below it.

    Args:
        path: of the dataclass; empty for the settings of a verb.
    """
    name, _, fact = str(error).partition(" ")
    name = name.removesuffix(":")
    holder: Any = schema
    for step in name.split(".")[:-1]:
        holder = typing.get_type_hints(holder).get(step) if dataclasses.is_dataclass(holder) else None
    last = name.rpartition(".")[2]
    if not (dataclasses.is_dataclass(holder) and has_field(holder, last)):  # pyright: ignore[reportArgumentType]
        return UserError(path or schema_name(schema), str(error), "Give its settings other values")
    remedy = f"Give it another value ({describe(holder, last)})"  # pyright: ignore[reportArgumentType]
    return UserError(f"{path}.{name}".lstrip("."), fact, remedy)


def schema_name(schema: type) -> str:
    """A dataclass as the user knows it: `dpo`, `the stage`, `a source`."""
    for (group, name), option in OPTIONS.items():
        if option is schema:
            return name if group in ("objective", "optimizer", "verb") else _a(group)
    return _a(re.sub(r"(Config|Settings|Conf)$", "", schema.__name__).lower())


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def describe(schema: type, name: str) -> str:
    """`number, default 0.1`"""
    setting = next(f for f in dataclasses.fields(schema) if f.name == name)
    kind = _kind(typing.get_type_hints(schema)[name])
    if setting.default in (dataclasses.MISSING, "???"):
        return kind
    return f"{kind}, default {'null' if setting.default is None else setting.default}"


def _kind(hint: Any) -> str:
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}
    if hint in names:
        return names[hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_kind(part) if part is not type(None) else "null" for part in typing.get_args(hint))
    if dataclasses.is_dataclass(hint) and len(inside := dataclasses.fields(hint)) <= MOST_LISTED:
        return f"several settings: {', '.join(f.name for f in inside)}"
    return "list" if typing.get_origin(hint) in (list, tuple) else "several settings"


def _paths(schema: type, prefix: str = "") -> Iterable[str]:
    """Dotted names of all fields of the dataclasses inside `schema`, nearest first."""
    inside = []
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint) and name in {f.name for f in dataclasses.fields(schema)}:
            parts = [hint, *subclasses(hint)]  # pyright: ignore[reportArgumentType]
            yield from dict.fromkeys(f"{prefix}{name}.{f.name}" for part in parts for f in dataclasses.fields(part))
            inside.append((hint, f"{prefix}{name}."))
    for hint, path in inside:
        yield from _paths(hint, path)


def subclasses(schema: type) -> list[type]:
    """The options that are kinds of `schema`."""
    return [option for option in OPTIONS.values() if issubclass(option, schema) and option is not schema]
