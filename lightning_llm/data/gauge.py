"""How much of a source has been read: its reader tells, who shows progress asks."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[float], None]  # is told which share of a file or table has been read, from 0 to 1


class Gauge:
    """The share of a source that has been read, from 0 to 1; None as long as its reader cannot tell."""

    def __init__(self) -> None:
        self.share: float | None = None

    def part(self, begin: float, end: float) -> Tell:
        """What the reader of a part tells its own share to; the part goes from share `begin` to `end` of the whole."""

        def tell(share: float) -> None:
            self.share = begin + share * (end - begin)

        return tell


def expected_rows(rows: int, share: float | None, most: int | None) -> float | None:
    """How many rows there will be when `rows` have come with a share of their source, and at most `most` are taken.

    None where nobody can tell.
    """
    known = [rows / share] if share else []
    return min(known + ([most] if most is not None else []), default=None)
