"""What `options` of an embedded source may hold. Standard library only: asked before anything is read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from lightning_llm.data.embedded import CONTENTS, options_of
from lightning_llm.data.embedded.tasks import SPLITS, TASKS, different_questions
from lightning_llm.settings import UserError

LOWEST = {"rows": 1, "held_out": 0, "questions": 1, "max_bytes": 1}  # counts


def check_embedded(name: str, options: Mapping[str, Any], where: str) -> None:
    """Refuse options that the source `embedded:<name>` has not, and values that they cannot have.

    Args:
        where: the setting that names the source, as `data.sources.mine`.

    Raises:
        UserError: names the option.
    """
    known = options_of(name)
    for option, value in options.items():
        key = f"{where}.options.{option}"
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            listed = ", ".join(sorted(known))
            remedy = f"The nearest is {near[0]} (known: {listed})" if near else f"Known: {listed}"
            raise UserError(key, f"is not an option of embedded:{name}", remedy)
        if option == "task":
            if value is not None and value not in TASKS:
                raise UserError(key, f"there is no task {value}", f"Take {', '.join(TASKS)}")
        elif option == "split":
            if value not in SPLITS:
                raise UserError(key, f"there is no split {value}", f"Take {' or '.join(SPLITS)}")
        elif option == "multi_turn":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(key, f"is {value!r}", "Give a share between 0 and 1")
        elif option == "graded":
            if not isinstance(value, bool):
                raise UserError(key, f"is {value!r}", "Give true or false")
        elif isinstance(value, bool) or not isinstance(value, int):
            raise UserError(key, f"is {value!r}", "Give a whole number")
        elif value < LOWEST.get(option, value):
            raise UserError(key, f"is {value}", f"It must be at least {LOWEST[option]}")
    if CONTENTS[name][0] == "questions":
        split = options.get("split", "validation")
        if "questions" in options and (split == "train" or "held_out" in options):
            _refuse_too_many("questions", options, "train", where)
        held_out = "held_out" if "held_out" in options else "questions"
        if held_out in options and split == "validation":
            _refuse_too_many(held_out, options, "validation", where)


def refuse_columns(path: str, columns: Mapping[str, str], where: str) -> None:
    """Refuse columns of an embedded source: its fields have our names already, and none would be renamed.

    Args:
        path: of any source.
        columns: of its settings.
        where: the setting that names the source, as `data.sources.mine`.

    Raises:
        UserError: names the setting.
    """
    if columns and path.startswith("embedded:"):
        raise UserError(
            f"{where}.columns", f"is given, and the fields of {path} have our names already", "Take it away"
        )


def _refuse_too_many(option: str, options: Mapping[str, Any], split: str, where: str) -> None:
    task, count = fewest_questions(options.get("task"), options[option], split)
    if count < options[option]:
        which = "held out" if split == "validation" else "not held out"
        what = f"is {options[option]}, and only {count} different questions of {task} are {which}"
        raise UserError(f"{where}.options.{option}", what, f"Give at most {count}")


def fewest_questions(task: str | None, wanted: int, split: str = "validation") -> tuple[str, int]:
    """The task with the fewest questions of a split, and how many that are, counted up to `wanted`.

    Args:
        task: the one that is asked; none: all four are.
    """
    counts = {name: different_questions(split, name, wanted) for name in ([task] if task else TASKS)}
    return min(counts.items(), key=lambda entry: entry[1])
