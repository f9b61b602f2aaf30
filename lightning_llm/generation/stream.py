"""Tokens to text while they come: characters are shown when all their bytes are there, stop strings never."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNDECODED = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character, or not yet
LONGEST = 4  # bytes of a character


class TextStream:
    """The text of one reply, piece by piece. The pieces are its text, up to the first stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops = decode, stops
        self.text = ""  # all that was handed out
        self.is_stopped = False  # by a stop string
        self.held = ""  # certain, but perhaps the beginning of a stop string
        # Only the newest tokens are decoded again: from one boundary of characters back, as a decoder may treat what
        # begins a text in a way of its own (it strips a space).
        self.ids: list[int] = []
        self.known = 0  # characters of these that are certain
        self.boundary = 0  # where in `ids` the next window begins

    def push(self, token: int) -> str:
        """What one more token makes certain."""
        self.ids.append(token)
        text = self.decode(self.ids)
        certain = len(text) - pending(text)
        new, self.known = text[self.known : certain], max(self.known, certain)
        if certain == len(text) and text:
            self.ids = self.ids[self.boundary :]
            self.known, self.boundary = len(self.decode(self.ids)), len(self.ids)
        return self._hand_out(new, is_last=False)

    def finish(self) -> str:
        """What is left when no token follows."""
        return "" if self.is_stopped else self._hand_out(self.decode(self.ids)[self.known :], is_last=True)

    def _hand_out(self, new: str, is_last: bool) -> str:
        self.held += new
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            piece, self.held = self.held[: min(found)], ""
        else:
            keep = 0 if is_last else begun(self.held, self.stops)
            piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.text += piece
        return piece


def pending(text: str) -> int:
    """Characters at the end of a decoded text that the next bytes may still change."""
    undecoded = len(text) - len(text.rstrip(UNDECODED))
    return min(undecoded, LONGEST - 1)


def begun(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that are the beginning of a stop string."""
    longest = min(max(map(len, stops), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
