"""The batches of a stage as a pure function of (seed, step): what each optimizer step consumes, on every rank.

Documents are cut at multiples of the context from their own start, never to fill a budget; conversations and pairs are
never cut. Nothing is padded: a micro-batch is as many whole pieces as fit its budget of tokens.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import DataConfig
from lightning_llm.data.mixture import Mixture, SourceStream
from lightning_llm.data.token_store import TokenStore
from lightning_llm.schedules import BatchPlan, Progress, Ramp, as_ramp, ramp_value
from lightning_llm.settings import UserError

SHORTEST_CONTEXT = 4  # below it a cut could leave a piece without any target
VALIDATION_TOKENS = 16_384  # of each source, for the validation loss during a stage


def next_cut(position: int, length: int, context: int) -> int:
    """Where the piece of a document that holds the token at `position` ends.

    Cuts are at multiples of the context from the document's start. Where that left the last token alone, with nothing
    to predict it, the last cut lies one token earlier: a document's end mark is always learnt.
    """
    cut = (position // context + 1) * context
    if cut == length - 1:
        cut = length - 2 if position < length - 2 else length
    return min(cut, length)


class Piece(NamedTuple):
    """What stays together: a cut of a document, a conversation, or a pair with its prompt."""

    length: int  # tokens, of all segments together
    source: int  # index of the feed
    row: int
    begin: int  # tokens of the row left out before it
    end: int  # and where it ends, counted from the row's start


@dataclass(frozen=True)
class Window:
    """All that one optimizer step consumes, and this rank's share of it."""

    step: int
    progress: Progress  # after this window; tokens are nominal
    mine: list[SegmentBatch]  # as many on every rank; what is missing is filled up by batches that count nothing
    target_tokens: int  # over all ranks; 0 is possible where a step is smaller than a piece
    pairs: int  # over all ranks
    consumed: dict[str, int]  # source -> tokens of this window, over all ranks
    samples: int  # rows that begin in this window
    context: int


class Feed:
    """One split of one source, in pieces.

    Args:
        store: its tokens.
        context: the smallest that the pieces have to fit; documents are cut for the context at hand.
        on_long: what becomes of a conversation or pair that does not fit: drop | truncate_left | stop.
        columns: per-token values beside the tokens, by name.
    """

    def __init__(self, name: str, store: TokenStore, context: int, on_long: str, columns: Mapping[str, np.ndarray]):
        self.name, self.store, self.columns = name, store, columns
        self.is_cut = store.form == "text"
        self.rows: np.ndarray | None = None  # the store's row of each of ours; none: all, in order
        self.lengths = store.row_lengths  # tokens of each of our rows
        self.skipped = np.zeros(store.rows, np.int64) if store.rows and on_long == "truncate_left" else None
        self.dropped = 0
        if not self.is_cut:
            self._fit(context, on_long)

    def _fit(self, context: int, on_long: str) -> None:
        """Drop or truncate the rows that need more than `context`."""
        needed, fits = self.store.row_contexts, self.store.row_contexts <= context
        if fits.all():
            self.skipped = None
            return
        if on_long == "stop":
            row = int(np.flatnonzero(~fits)[0])
            raise UserError(
                f"data.sources.{self.name}",
                f"row {row} needs a context of {needed[row]}, the stage has {context}",
                "Raise the context, or set data.on_long to drop or truncate_left",
            )
        if self.skipped is not None:  # the first segment gives way, but for one token
            first = np.diff(self.store.offsets)[:: self.store.segments_per_row]
            self.skipped = np.maximum(needed - context, 0)
            fits = self.skipped < first
            self.lengths = self.lengths - self.skipped
        self.rows = np.flatnonzero(fits)
        self.lengths = self.lengths[self.rows]
        self.dropped = int((~fits).sum())

    def pieces(self, index: int, ours: int, begin: int, low: int, high: int, context: int) -> Iterator[Piece]:
        """Pieces of our row `ours` that start in [low, high), of the part from `begin` on (tokens from its start)."""
        length = int(self.lengths[ours])
        row = ours if self.rows is None else int(self.rows[ours])
        if not self.is_cut:
            if low <= 0 < high:
                skipped = 0 if self.skipped is None else int(self.skipped[row])
                yield Piece(length, index, row, skipped, skipped + length)
            return
        start = begin if low <= begin else next_cut(low - 1, length, context)
        while start < min(high, length):
            end = next_cut(start, length, context)
            yield Piece(end - start, index, row, start, end)
            start = end

    def piece_end(self, ours: int, position: int, context: int) -> int:
        """End of the piece of our row `ours` that holds its token at `position`."""
        length = int(self.lengths[ours])
        return next_cut(position, length, context) if self.is_cut else length

    def targets(self, piece: Piece) -> int:
        """How many targets count in a piece."""
        if self.store.form == "text":
            return piece.length - 1
        if piece.begin:  # truncated, and the first token that is left has nothing to predict it
            first = self.store.token_slice(piece.row).start
            assert self.store.is_target is not None
            return int(self.store.is_target[first + piece.begin + 1 : first + piece.end].sum())
        return int(self.store.target_counts[piece.row])

    def spans(self, piece: Piece) -> list[tuple[int, int]]:
        """Where the piece's segments lie in tokens.bin."""
        offsets = self.store.segment_offsets(piece.row)
        first, last = offsets[0] + piece.begin, offsets[0] + piece.end
        offsets[0], offsets[-1] = first, last
        return list(zip(offsets, offsets[1:], strict=False))


def build_batch(feeds: Sequence[Feed], pieces: Sequence[Piece], columns: Sequence[str] = ()) -> SegmentBatch:
    """The pieces as one batch; without any, a batch in which nothing counts."""
    segments: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    prefix: list[int] = []
    values: dict[str, list[np.ndarray | None]] = {name: [] for name in columns}
    for piece in pieces:
        feed = feeds[piece.source]
        store, first = feed.store, len(segments)
        for i, (begin, end) in enumerate(feed.spans(piece)):
            segments.append(store.ids[begin:end])
            masks.append(None if store.is_target is None else store.is_target[begin:end])
            prefix.append(first if i else -1)
            for name in columns:
                values[name].append(feed.columns[name][begin:end])
    if not segments:
        segments, masks, prefix = [np.zeros(2, np.int64)], [np.zeros(2, bool)], [-1]
        values = {name: [None] for name in columns}
    return SegmentBatch.from_segments(segments, prefix, masks, values)


def share_out(lengths: Sequence[int], ranks: int, budget: int) -> list[list[int]]:
    """Pieces into micro-batches of about equal size, a multiple of `ranks` of them.

    The longest piece first, always into the emptiest micro-batch (longest processing time, Graham 1969). A micro-batch
    holds at most `budget` tokens; a longer piece goes alone.

    Returns:
        For each micro-batch the indices of its pieces; rank r takes every `ranks`-th from r on.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = ranks * max(math.ceil(sum(lengths) / (ranks * budget)), 1)
    while True:
        heap = [(0, b) for b in range(count)]  # (tokens, micro-batch)
        shares: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            tokens, b = heap[0]
            if tokens and tokens + lengths[i] > budget:
                break
            shares[b].append(i)
            heapq.heapreplace(heap, (tokens + lengths[i], b))
        else:
            return shares
        count += ranks


def iterate_batches(
    feed: Feed, context: int, max_tokens: int, rows: Sequence[int] | None = None, columns: Sequence[str] = ()
) -> Iterator[tuple[SegmentBatch, np.ndarray]]:
    """A source from its first row to its last, in batches of at most `max_tokens` (a longer piece goes alone).

    Args:
        rows: of the feed, in this order; none: all.

    Yields:
        The batch, and for each of its tokens where it lies in tokens.bin: [T] int64.
    """
    pieces: list[Piece] = []
    tokens = 0
    for ours in range(len(feed.lengths)) if rows is None else rows:
        for piece in feed.pieces(0, ours, 0, 0, int(feed.lengths[ours]), context):
            if pieces and tokens + piece.length > max_tokens:
                yield build_batch([feed], pieces, columns), _origins(feed, pieces)
                pieces, tokens = [], 0
            pieces.append(piece)
            tokens += piece.length
    if pieces:
        yield build_batch([feed], pieces, columns), _origins(feed, pieces)


def _origins(feed: Feed, pieces: Sequence[Piece]) -> np.ndarray:
    return np.concatenate([np.arange(begin, end) for piece in pieces for begin, end in feed.spans(piece)])


class StageData:
    """The windows of a stage. Any step, any rank and any number of ranks can be asked for at any time.

    Source s should have given C_s(t) tokens before step t (`Mixture`). Its stream (`SourceStream`) is cut into pieces,
    and step t takes those that start in [C_s(t), C_s(t + 1)): each piece belongs to one step, none is taken twice, and
    what a source has given never exceeds what it should have by more than a piece.
    """

    def __init__(
        self,
        prepared: Path,
        data: DataConfig,
        *,
        context_ramp: Ramp | int,
        batch_ramp: Ramp | int,
        total_tokens: int,
        seed: int,
        token_columns: Mapping[str, Path] | None = None,
    ):
        """
        Args:
            prepared: an artifact of the stage `prepare`.
            context_ramp, batch_ramp: tokens of a piece and of a step, over consumed tokens.
            token_columns: name -> artifact of the stage `score`; its values become a column of the batches.

        Raises:
            UserError: a source is empty, or would be seen more than `data.max_epochs` times.
        """
        self.prepared, self.data, self.seed = Path(prepared), data, seed
        self.context_ramp = as_ramp(context_ramp)
        self.plan = BatchPlan(as_ramp(batch_ramp), total_tokens)
        self.steps = self.plan.steps
        self.token_columns = dict(token_columns or {})
        self.sources = list(data.sources)
        contexts = [int(entry["value"]) for entry in self.context_ramp]
        if min(contexts) < SHORTEST_CONTEXT:
            raise UserError("context", f"is {min(contexts)}", f"Give at least {SHORTEST_CONTEXT} tokens")
        self.mixture = Mixture({name: source.weight for name, source in data.sources.items()}, total_tokens)
        self.feeds = [self._feed(name, "train", min(contexts)) for name in self.sources]
        self.dropped = {feed.name: feed.dropped for feed in self.feeds}  # rows longer than the smallest context
        self.epochs: dict[str, float] = {}  # passes over each source
        self._refuse_repetition(total_tokens)
        self.streams = [SourceStream(feed.name, feed.lengths, seed) for feed in self.feeds]
        changes = [self.plan.step_at(entry["at"]) for entry in self.context_ramp]
        self._phases = [(step, context) for step, context in zip(changes, contexts, strict=True)]
        self._entries: list[list[int]] = [[] for _ in self.feeds]  # per source and phase: where its pieces begin
        for phase, (step, _) in enumerate(self._phases):
            for s in range(len(self.feeds)):
                self._entries[s].append(self._consumed(s, step, phase - 1) if phase else 0)

    def _feed(self, name: str, split: str, context: int) -> Feed:
        store = TokenStore.open(self.prepared / "sources" / name / split)
        columns = {}
        for column, artifact in self.token_columns.items():
            path = Path(artifact) / name / split / "logps.bin"
            if not path.is_file() or path.stat().st_size != 4 * store.tokens:
                raise UserError(str(path), f"does not hold one number per token of {name}", "Score the data again")
            columns[column] = np.fromfile(path, np.float32) if not store.tokens else np.memmap(path, np.float32, "r")
        return Feed(name, store, context, self.data.on_long, columns)

    def _refuse_repetition(self, total_tokens: int) -> None:
        for feed in self.feeds:
            wanted, tokens = self.mixture.target(feed.name, total_tokens), int(feed.lengths.sum())
            if wanted and not tokens:
                dropped = f" ({feed.dropped} are longer than the context)" if feed.dropped else ""
                raise UserError(
                    f"data.sources.{feed.name}", f"has no rows to train on{dropped}", "Give it rows or no weight"
                )
            self.epochs[feed.name] = epochs = wanted / tokens if tokens else 0.0
            if epochs > self.data.max_epochs:
                raise UserError(
                    f"data.sources.{feed.name}",
                    f"would be seen {epochs:.1f} times ({wanted:,} tokens of {tokens:,}; "
                    f"max_epochs is {self.data.max_epochs:g})",
                    "Give more data, fewer tokens or less weight, or raise data.max_epochs",
                )

    def context(self, step: int) -> int:
        """The context of a step: the ramp's value where the step begins."""
        return self._phases[self._phase(step)][1]

    def ledger(self, step: int) -> dict[str, int]:
        """Tokens of each source consumed before `step`, exactly."""
        phase = self._phase(max(step - 1, 0))
        return {feed.name: self._consumed(s, step, phase) for s, feed in enumerate(self.feeds)}

    def progress(self, step: int) -> Progress:
        """The counters before `step`."""
        return Progress(tokens=self.plan.boundary(step), samples=sum(self._rows_before(step)), steps=step)

    def window(self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch_tokens: int) -> Window:
        """What step `step` consumes, and rank `rank`'s micro-batches of it.

        Raises:
            IndexError: the stage has no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        pieces = [piece for s in range(len(self.feeds)) for piece in self._pieces(s, step)]
        shares = share_out([piece.length for piece in pieces], world_size, micro_batch_tokens)
        columns = list(self.token_columns)
        mine = [build_batch(self.feeds, [pieces[i] for i in share], columns) for share in shares[rank::world_size]]
        consumed = dict.fromkeys(self.sources, 0)
        for piece in pieces:
            consumed[self.sources[piece.source]] += piece.length
        after = self.progress(step + 1)
        return Window(
            step=step,
            progress=after,
            mine=mine,
            target_tokens=sum(self.feeds[piece.source].targets(piece) for piece in pieces),
            pairs=sum(self.feeds[piece.source].store.form == "pairs" for piece in pieces),
            consumed=consumed,
            samples=after.samples - sum(self._rows_before(step)),
            context=self.context(step),
        )

    def validation(
        self, context: int, max_tokens: int, limit: int = VALIDATION_TOKENS
    ) -> Iterator[tuple[str, SegmentBatch]]:
        """Held-out rows of each source, in batches of at most `max_tokens`; the same rows at any time of any stage.

        Args:
            limit: tokens of each source, about.
        """
        for name in self.sources:
            feed = self._feed(name, "validation", context)
            if not len(feed.lengths):
                continue
            stream = SourceStream(name, feed.lengths, seed=0)
            last = min(limit, stream.tokens)
            rows = [row for row, _ in zip_while(stream.rows_from(0), last)]
            for batch, _ in iterate_batches(feed, context, max_tokens, rows, list(self.token_columns)):
                yield name, batch

    def _phase(self, step: int) -> int:
        return max((i for i, (first, _) in enumerate(self._phases) if first <= step), default=0)

    def _target(self, source: int, step: int) -> int:
        return self.mixture.target(self.sources[source], self.plan.boundary(step))

    def _pieces(self, source: int, step: int) -> Iterator[Piece]:
        low, high = self._target(source, step), self._target(source, step + 1)
        phase = self._phase(step)
        entry, context = self._entries[source][phase], self._phases[phase][1]
        if low == high:
            return
        feed = self.feeds[source]
        for row, start in self.streams[source].rows_from(low):
            if start >= high:
                return
            yield from feed.pieces(source, row, max(entry - start, 0), low - start, high - start, context)

    def _consumed(self, source: int, step: int, phase: int) -> int:
        """End of the last piece that starts before step `step`, all of whose predecessors are of `phase` or before."""
        target, entry = self._target(source, step), self._entries[source][phase]
        if target <= entry:
            return entry
        row, start = next(self.streams[source].rows_from(target - 1))
        return start + self.feeds[source].piece_end(row, target - 1 - start, self._phases[phase][1])

    def _rows_before(self, step: int) -> list[int]:
        targets = ((s, self._target(s, step)) for s in range(len(self.feeds)))
        return [self.streams[s].rows_before(target) if target else 0 for s, target in targets]


def zip_while(rows: Iterator[tuple[int, int]], tokens: int) -> Iterator[tuple[int, int]]:
    """Rows of a stream that begin before `tokens`."""
    for row, start in rows:
        if start >= tokens:
            return
        yield row, start
