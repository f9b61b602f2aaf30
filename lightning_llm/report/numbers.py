"""Numbers as a reader wants them: 2.05 M tokens, 3 min 20 s, 1.2e13. A dash where there is none."""

from __future__ import annotations

import math
from typing import Any

NOTHING = "-"


def is_number(value: Any) -> bool:
    """Whether a value can be shown as one: true, infinities and NaN cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def quantity(value: Any) -> str:
    """A count with three digits and a unit: 812, 15.4 k, 2.05 M, 7 T; beyond that 3.1e+22."""
    if not is_number(value):
        return NOTHING
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= 1e15:
            return f"{value:.2e}"
        if abs(value) >= size:
            size = 1e3 if unit == " k" else size
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if float(value).is_integer() else figure(value)


def flops(value: Any) -> str:
    """Floating point operations."""
    return f"{value:.2e}" if is_number(value) and value else NOTHING


def figure(value: Any) -> str:
    """A measured value, four significant digits."""
    if not is_number(value):
        return NOTHING if value is None or isinstance(value, float) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def measure(value: Any) -> str:
    """A metric for a column of them: three decimals, fewer where the number is large."""
    if not is_number(value):
        return NOTHING
    places = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{places}f}"


def size(count: Any) -> str:
    """Bytes: 812 B, 3.1 MiB, 12 GiB."""
    if not is_number(count):
        return NOTHING
    power = 0 if count < 1 else min(int(math.log2(count) / 10), 4)
    scaled = count / 1024**power
    return f"{scaled:.{3 if scaled < 1000 else 4}g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def share(value: Any) -> str:
    """A share of one in per cent."""
    return f"{100 * value:.1f} %" if is_number(value) else NOTHING


def duration(seconds: Any) -> str:
    """Wall time."""
    if not is_number(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours / 24:.1f} days"


def digits(value: Any) -> Any:
    """Five significant digits of a float: what a drawing needs, at a third of the bytes."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
