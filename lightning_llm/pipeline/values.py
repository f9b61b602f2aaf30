"""Single values that cannot be: refused under the key that the user has typed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from lightning_llm.pipeline.names import name_nearest
from lightning_llm.settings import UserError


def one_of(key: str, value: str, known: Sequence[str]) -> None:
    """Refuse what is none of a setting's values; names the key and the nearest one."""
    if value not in known:
        raise UserError(key, f"{value!r} is not one of its values", name_nearest(str(value), known))


def each_once(key: str, names: Sequence[str], remedy: str) -> None:
    """Refuse a stage or a folder that is named twice, however a folder is spelt; names the key."""
    for place, name in enumerate(map(os.path.normpath, names)):
        if name in map(os.path.normpath, names[:place]):
            raise UserError(key, f"names {name} twice", remedy)


def in_range(
    key: str, value: Any, low: float = float("-inf"), above: float = float("-inf"), below: float = float("inf")
) -> None:
    """Refuse what is no number from `low` on, above `above` and below `below`; names the key."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(key, f"is {value!r} and not a number", "Give a number")
    if not (value >= low and value > above and value < below):
        wanted = [f"at least {low:g}" * (low > float("-inf")), f"above {above:g}" * (above > float("-inf"))]
        wanted += [f"below {below:g}" * (below < float("inf"))]
        if not math.isfinite(value):
            wanted = ["finite", *wanted]
        raise UserError(key, f"is {value:g}", f"It must be {' and '.join(filter(None, wanted))}")


def whole(key: str, value: Any, low: int, below: int) -> None:
    """Refuse what is no whole number of tokens in [low, below); names the key."""
    in_range(key, value, low=low, below=below)
    if value != int(value):
        raise UserError(key, f"is {value:g} tokens", "Give a whole number")
