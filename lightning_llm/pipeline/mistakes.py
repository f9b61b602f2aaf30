"""What Hydra and OmegaConf complain about, as one line that names the key and the nearest valid one."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_llm.pipeline.mappings import is_open, known_entries
from lightning_llm.pipeline.names import (
    describe,
    has_field,
    listed,
    name_nearest,
    nearest,
    new_entry,
    subclasses,
    unknown_entry,
    unknown_setting,
)
from lightning_llm.settings import OPTIONS, UserError
from lightning_llm.stages.config import StageConfig

COMMAND_LINE = "command line"
WITH_RECIPE = ("run", "plan")  # verbs


def as_user_error(error: BaseException, verb: str, loader: Any, overrides: Sequence[str]) -> UserError | None:
    """The mistake of the user's that `error` reports; None if it is none.

    Args:
        loader: Hydra's, which knows groups and files.
        overrides: as the user gave them.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(error, loader)
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        where = f"{_shown(mark.name)}:{mark.line + 1}" if mark else "YAML"
        return UserError(where, f"is not YAML ({error.problem})", "Mend that line, or the one before it")
    if isinstance(error, OverrideParseException):
        return UserError(COMMAND_LINE, f"{error.override!r} cannot be read", "Overrides have the form key=value")
    if isinstance(error, MissingConfigException):
        return _unknown_option(error, loader, overrides)
    if isinstance(error, OmegaConfBaseException):
        return _refused_value(error, COMMAND_LINE, loader)
    if isinstance(error, ConfigCompositionException):
        return _not_composed(error, verb, loader, overrides)
    if isinstance(error, HydraException):
        return UserError(COMMAND_LINE, _first_line(error), "See --help")
    if isinstance(error, RecursionError):
        chosen = _chosen_files(overrides, loader)
        what = f"the defaults of the files that {chosen} chooses name each other in a circle"
        return UserError(COMMAND_LINE, what, "Let none of them name itself, or a file that names it")
    return None


def in_hydras_words(error: BaseException, verb: str, loader: Any, overrides: Sequence[str]) -> UserError:
    """A mistake that Hydra states as a plain ValueError, TypeError or AssertionError, without naming the key."""
    if invalid := re.match(r"Invalid defaults list in '([^']*)', defaults must be a list", str(error)):
        remedy = "Write them in brackets: defaults: [NAME, _self_]"
        return UserError(file_of(invalid[1], loader), "its defaults are no list", remedy)
    for override in _parsed(overrides):
        value = override.value()
        if not override.key_or_group:
            return UserError(COMMAND_LINE, f"{override.input_line!r} names no key", "Overrides have the form key=value")
        if loader.repository.group_exists(override.key_or_group) and not isinstance(value, str | list):
            if override.is_delete() and value is None:
                continue
            given = "null" if value is None else str(value).lower()
            options = ", ".join(_options(override.key_or_group, loader))
            otherwise = "" if override.key_or_group == "recipe" else ", or leave it out"
            what = f"{override.key_or_group} cannot be {given}: it chooses a file"
            return UserError(COMMAND_LINE, what, f"Choose one of {options}{otherwise}")
    if "NoneType" in str(error):  # a setting of what is null, alone or in a mapping
        if found := _null_part(verb, loader, overrides):
            return _of_nothing(*found, loader)
    return UserError(COMMAND_LINE, _first_line(error), "See --help")


def _null_part(verb: str, loader: Any, overrides: Sequence[str]) -> tuple[str, str] | None:
    """A key that is set below what is null without it, and that null."""
    set_below, kept = [], []
    for override in _parsed(overrides):
        is_below = override.key_or_group.startswith("stages.") and override.value() is not None
        (set_below if is_below else kept).append(override)
    lines = [override.input_line for override in kept if override.input_line]
    config = loader.load_configuration(verb, lines, run_mode=RunMode.RUN, from_shell=False)
    for override in set_below:
        key = override.key_or_group
        parts = key.split(".")
        for count in range(1, len(parts) + isinstance(override.value(), dict)):
            if OmegaConf.select(config, above := ".".join(parts[:count])) is None:
                return key, above
    return None


def _of_nothing(key: str, empty: str, loader: Any) -> UserError:
    """A setting is given of what is null: a stage that is left out, or a part that the stage does without.

    Args:
        empty: the part of the key that is null.
    """
    if re.fullmatch(r"stages\.\w+(\.stages\.\w+)?", empty):
        what = f"a setting is given of a stage that the recipe leaves out, {empty}"
        return UserError(COMMAND_LINE, what, "Leave it out, too")
    stage, _, group = empty.rpartition(".")
    remedy = f"Leave it out, or choose a stage that has one: stage@{stage}=NAME"
    if loader.repository.group_exists(group):
        remedy = f"+{group}@{empty}=NAME gives it one"
    what = f"{empty} is null, and " + (f"{key} is a setting of it" if key != empty else "settings of it are given")
    return UserError(COMMAND_LINE, what, remedy)


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Those that can be read."""
    parsed = []
    for override in overrides:
        with contextlib.suppress(OverrideParseException):
            parsed.append(OverridesParser.create().parse_override(override))
    return parsed


def _chosen_files(overrides: Sequence[str], loader: Any) -> str:
    """`recipe=mine and experiment=x`: what of the command line chooses files."""
    chosen = (o.input_line for o in _parsed(overrides) if loader.repository.group_exists(o.key_or_group))
    return " and ".join(filter(None, chosen)) or "the verb"


def _not_utf8(error: UnicodeDecodeError, loader: Any) -> UserError:
    """Python names the bytes and not the file."""
    for source in loader.get_sources():
        folder = Path(source.path)
        for path in sorted(folder.rglob("*.yaml")) if source.scheme() == "file" and folder.is_dir() else ():
            content = path.read_bytes() if path.is_file() else b""
            if error.object in content:
                line = content[: content.index(error.object) + error.start].count(b"\n") + 1
                byte = f"0x{error.object[error.start]:02x}"
                return UserError(f"{_shown(path)}:{line}", f"is not UTF-8 (byte {byte})", "Save the file as UTF-8")
    return UserError("YAML", f"is not UTF-8 ({error})", "Save the file as UTF-8")


def _unknown_option(error: MissingConfigException, loader: Any, overrides: Sequence[str]) -> UserError:
    path, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not option and not loader.repository.group_exists(path):  # `recipe=qwen2/`
        path, _, option = path.rpartition("/")
        option += "/"
    where = COMMAND_LINE
    if (file := re.match(r"In '([^']*)'", str(error))) and not _is_chosen(path, option, overrides):
        where = _file_naming(option, file_of(file[1], loader), loader, overrides)
    if path and not loader.repository.group_exists(path):
        return UserError(where, f"there is no group {path}", name_nearest(path, groups(loader)))
    known = _options(path, loader) if path else [name for name in error.options or [] if not name.startswith("_")]
    what = f"{option or repr(option)} is not an option of {path}" if path else f"there is no configuration {option}"
    return UserError(where, what, name_nearest(option, known))


def _file_naming(option: str, file: str, loader: Any, overrides: Sequence[str]) -> str:
    """The file that names an option: Hydra blames the one that chose before, where another has overridden that."""
    chosen = [file_of(f"{o.key_or_group}/{o.value()}", loader) for o in _parsed(overrides) if not o.is_delete()]
    for path in (file, *chosen):
        if Path(path).is_file() and re.search(rf"\b{re.escape(option)}\b", Path(path).read_text("utf-8")):
            return path
    return file


def _is_chosen(group: str, option: str, overrides: Sequence[str]) -> bool:
    """Whether the command line names the option, alone or in a list."""
    for override in _parsed(overrides):
        value = override.value()
        values = value if isinstance(value, list) else [value]
        if f"{group}/{option}" in (f"{override.key_or_group}/{value}" for value in values):  # `recipe=/a/b`, too
            return True
    return False


def _options(group: str, loader: Any) -> list[str]:
    return [name for name in loader.get_group_options(group) if not name.startswith("_")]


def _not_composed(error: ConfigCompositionException, verb: str, loader: Any, overrides: Sequence[str]) -> UserError:
    text = str(error)
    if mistake := _without_package(text, loader, overrides):
        return mistake
    if file := re.match(r"In '([^']*)': \w+ raised while composing config", text):
        where = COMMAND_LINE if file[1].startswith("schema/") else file_of(file[1], loader)
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OmegaConfBaseException):
            return _refused_value(cause, where, loader)
        return UserError(where, " ".join(text.split("\n")[1:2]), "See --help")
    if group := re.match(r"Override (\S+) looks like a config group override, but config group '(.*)' does", text):
        return UserError(COMMAND_LINE, f"there is no group {group[2]}", name_nearest(group[2], groups(loader)))
    if package := re.search(r"Could not override '([^']*)'", text):
        if isinstance(error.__cause__, OmegaConfBaseException):
            typed = next((o for o in overrides if o.partition("=")[0] == package[1]), "")
            return _refused_value(error.__cause__, COMMAND_LINE, loader, asked=package[1], typed=typed)
        file = re.match(r"In '([^']*)'", text)
        if verb not in WITH_RECIPE and package[1] in groups(loader):
            what = f"{package[1]} is not a setting of {verb}"
            return UserError(COMMAND_LINE, what, f"It belongs to {listed(WITH_RECIPE)}")
        choices = re.findall(r"[\w/]+(?:@[\w.]+)?(?=[,?])", text.partition("Did you mean to override")[2])
        near = nearest(package[1], choices)
        remedy = f"The nearest is {near}" if near else "Address it as group@key, as objective@stages.dpo.objective"
        where = file_of(file[1], loader) if file else COMMAND_LINE
        return UserError(where, f"nothing chooses {package[1]}", remedy)
    if text.startswith("Error merging override"):
        if isinstance(error.__cause__, OmegaConfBaseException):
            given = text.removeprefix("Error merging override").strip().lstrip("+").partition("=")[0]
            return _refused_value(error.__cause__, COMMAND_LINE, loader, asked=given)
    if absent := re.match(r"Could not delete from config. '([^']*)' does not exist", text):
        return _nothing_to_take_away(absent[1], verb, loader, overrides)
    if other := re.match(
        r"Could not delete from config. The value of '(\S*)' is (.*) and not (.*)\.$", text, re.DOTALL
    ):
        value = "several settings" if other[2].startswith("{") else " ".join(other[2].split())
        return UserError(COMMAND_LINE, f"{other[1]} is {value}, not {other[3]}", f"Take it away with ~{other[1]}")
    if twice := re.match(r"Multiple values for (\S+)\. To override a value use 'override \S+: (.*)'", text):
        if any(word.startswith(f"+{twice[1]}=") for word in overrides):
            remedy = f"Write {twice[1]}={twice[2]}, without the +"
            return UserError(COMMAND_LINE, f"{twice[1]} is chosen already", remedy)
        what = (
            f"{twice[1]} is chosen twice in the defaults of the files that {_chosen_files(overrides, loader)} chooses"
        )
        return UserError(COMMAND_LINE, what, "Write `override` before the second, at the end of its list")
    if again := re.match(r"(?:schema/)?(\S+) appears more than once in the final defaults list", text):
        if any(word.startswith(f"+{again[1]}=") for word in overrides):
            what = f"{again[1].partition('@')[2] or again[1]} is there already"
            remedy = f"Leave +{again[1]} out; without the +, {again[1]}=... makes another of it"
            return UserError(COMMAND_LINE, what, remedy)
    if unchosen := re.match(r"Could not delete '([^']*)'. No match in the defaults list", text):
        return UserError(
            COMMAND_LINE, f"nothing chooses {unchosen[1]}, so ~{unchosen[1]} takes nothing away", "Leave it out"
        )
    if there := re.match(r"\s*Could not append to config. An item is already at '([^']*)'", text):
        return UserError(COMMAND_LINE, f"{there[1]} is there already", f"Write {there[1]}=VALUE, without the +")
    if ambiguous := re.match(r"Ambiguous value for argument '([^']*)'", text):
        key = ambiguous[1].partition("=")[0]
        return UserError(
            COMMAND_LINE, f"{key} is given several values", "Add -m to run them all, or write a list [a,b]"
        )
    if sweep := re.match(r"Sweep parameters '([^']*)' requires --multirun", text):
        return UserError(COMMAND_LINE, f"{sweep[1]} is a sweep", "Add -m to run all of it")
    if file := re.match(r"In '?([\w/.-]+)'?: (.*)", text):
        return UserError(file_of(file[1], loader), file[2], "Mend its defaults")
    return UserError(COMMAND_LINE, _first_line(error), "See --help")


def _without_package(text: str, loader: Any, overrides: Sequence[str]) -> UserError | None:
    """A recipe or an experiment of the user's whose keys have landed under the name of its group."""
    if not (key := re.search(r"Key '(recipe|experiment)' not in '|Key '(recipe|experiment)' is not in struct", text)):
        return None
    group = key[1] or key[2]
    for override in _parsed(overrides):
        if override.key_or_group == group and isinstance(option := override.value(), str):
            loaded = loader.repository.load_config(f"{group}/{option}")
            if loaded is not None and loaded.header.get("package") != "_global_":
                return UserError(
                    file_of(f"{group}/{option}", loader),
                    f"lacks its first line, so that all it says lands under {group}",
                    "Begin the file with `# @package _global_`, on a line of its own",
                )
    return None


def _nothing_to_take_away(key: str, verb: str, loader: Any, overrides: Sequence[str]) -> UserError:
    """`~key` for what is not there: the tree is composed without any `~` and searched for what comes near."""
    kept = [override for override in overrides if not override.startswith("~")]
    try:
        node: Any = loader.load_configuration(verb, kept, run_mode=RunMode.RUN, from_shell=False)
    except Exception:  # something else is wrong, too: this one is said without the nearest
        return UserError(COMMAND_LINE, f"{key} is not there, so ~{key} takes nothing away", "Leave it out")
    path: list[str] = []
    for name in key.split("."):
        path.append(name)
        schema = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
        more = groups(loader) if len(path) == 1 else ()
        if schema is None or name not in node:
            if schema is not None and dataclasses.is_dataclass(schema):
                return unknown_setting(".".join(path), schema, COMMAND_LINE, more)
            return unknown_entry(".".join(path), list(map(str, node or ())), COMMAND_LINE)
        node = node._get_node(name)
    return UserError(COMMAND_LINE, f"{key} is null already, and cannot be taken away", "Leave it out")


def _refused_value(
    error: OmegaConfBaseException, where: str, loader: Any, asked: str | None = None, typed: str = ""
) -> UserError:
    """A key that is none, or a value of the wrong type; OmegaConf's errors carry both the key and the place."""
    key = error.full_key or asked or str(error.key)
    parent: Any = error.parent_node
    refused = _first_line(error)
    if "is not in struct" in refused or re.match(r"Key '.*' not in '", refused):
        schema = error.object_type if dataclasses.is_dataclass(error.object_type) else None
        if schema is StageConfig:  # no kind is chosen for it: most likely another stage is meant
            name = (path := key.rpartition(".")[0]).rpartition(".")[2]
            others = [str(other) for other in parent._get_parent() or () if str(other) != name]  # pyright: ignore
            remedy = f"{name_nearest(name, others)}; a new one begins with an option of conf/stage/"
            return UserError(where, f"{path} is a stage of no kind", remedy)
        if schema is not None:
            chooses = (
                asked is not None and "." not in asked and has_field(schema, "stages")
            )  # other verbs choose no files
            more = groups(loader) if chooses else ()
            return unknown_setting(key, schema, where, more)
        if typed and is_open(key.rpartition(".")[0]):
            return new_entry(key, typed, where)
        group, _, name = key.rpartition(".")
        if loader.repository.group_exists(group) and name in _options(group, loader):
            return UserError(where, f"{key} is not there", f"Choose it first: {group}={name}")
        known = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
        return unknown_entry(key, known, where)
    if asked and "dict is not a subclass of" in refused:  # `+stages.new.tokens=1`: the new stage is nothing yet
        parts = asked.split(".")
        name = key.rpartition(".")[2]
        path = ".".join(parts[: parts.index(name) + 1]) if name in parts else asked
        above, _, name = path.rpartition(".")
        if name not in (known := known_entries(above) or [name]):
            return unknown_entry(path, known, where)
        adding = f"+stage@{path}=sft" if above == "stages" else f"'+{above}={{{name}: {{...}}}}'"
        return UserError(where, f"{path} is not there", f"Mend its name, or add it whole: {adding}")
    if "does not support deletion" in refused:
        return UserError(where, f"{key} cannot be taken away", "Give it a value instead")
    if "is not Optional" in refused and re.fullmatch(r"stages\.\w+\.stages\.\w+", key):
        return UserError(where, f"{key} cannot be null", f"Leave the stage out with ~{key}")
    schema = OmegaConf.get_type(parent) if isinstance(parent, DictConfig) else None
    if schema is not None and dataclasses.is_dataclass(schema):
        name = str(error.key)
        if name in {f.name for f in dataclasses.fields(schema)}:
            what = f"{key} cannot be {_given(error)}"
            if group := _group_with(error.value, typing.get_type_hints(schema)[name], loader):
                return UserError(where, what, f"Choose it with {group}@{key}={error.value}")
            return UserError(where, what, f"It is {describe(schema, name)}")
    if "is not a subclass of" in refused or re.match(
        r"Cannot merge DictConfig with|Cannot assign \w+ to Dict", refused
    ):
        if (own := re.search(r"logger/(\w+)\.yaml$", where)) and key.startswith("logger."):
            remedy = f"Begin the file with `# @package logger.{own[1]}`, on a line of its own"
            return UserError(where, "lacks its first line, so that it names no logger", remedy)
        return UserError(where, f"{_key_of(asked or key, refused)} cannot be {_given(error)}", "It is several settings")
    if "nterpolation" in type(error).__name__ or "nterpolation" in refused:
        return UserError(where, f"{key}: {refused}", "Refer to a key that is there")
    if kind := re.search(r"could not be converted to (Float|Integer)", refused):
        remedy = {"Float": "It is a number", "Integer": "It is a whole number"}[kind[1]]
        return UserError(where, f"{key} cannot be {_given(error)}", remedy)
    return UserError(where, f"{key}: {refused}", "See --help")


def _key_of(key: str, refused: str) -> str:
    """The key; where a whole file or group is no mapping OmegaConf names none, but for a group its schema."""
    if key != "None":
        return key
    schema = re.search(r"is not a subclass of (\w+)", refused)
    groups_of = {option.__name__: group for (group, _), option in OPTIONS.items()}
    return groups_of.get(schema[1], "what it says") if schema else "what it says"


def _given(error: OmegaConfBaseException) -> str:
    value = error.value
    if value is None and "is not Optional" in str(error):
        return "null"
    unfit = re.search(r"Value '(.*?)'(?: of type '\w+')? (?:is not a valid|could not be converted)", str(error))
    if unfit and not isinstance(value, str | int | float | bool):
        return unfit[1] if unfit[1].startswith(("[", "{")) else repr(unfit[1])
    if "with ListConfig" in str(error):
        return "a list"
    if assigned := re.search(r"is not a subclass of \w+\. value: (.*)", str(error)):
        return assigned[1]
    if isinstance(value, list | tuple | ListConfig):
        return "a list"
    if isinstance(value, dict | DictConfig):
        return "several settings"
    return repr(value) if isinstance(value, str | int | float | bool) else _first_line(error)


def _group_with(option: Any, hint: Any, loader: Any) -> str | None:
    """The group whose options give what `hint` says, if `option` is one of them."""
    if not isinstance(option, str) or not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return None
    own = {group for (group, _), schema in OPTIONS.items() if schema in (hint, *subclasses(hint))}
    return next((group for group in groups(loader) if group in own and option in _options(group, loader)), None)


def groups(loader: Any) -> list[str]:
    """The groups that a user chooses among."""
    return [name for name in loader.list_groups("") if name not in ("hydra", "schema")]


def file_of(config_path: str, loader: Any) -> str:
    """The file behind `recipe/mine`, as the user would name it."""
    for source in loader.get_sources():
        if source.scheme() == "file":
            path = Path(source.path) / f"{config_path}.yaml"
            if path.is_file():
                return _shown(path)
    return config_path


def _shown(path: str | Path) -> str:
    path = Path(path)
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
