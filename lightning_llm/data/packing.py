"""The batches of a stage as a pure function of (seed, step): what each optimizer step consumes, on every rank.

Documents are cut at multiples of the context from their own start, never to fill a budget; conversations and pairs are
never cut. Nothing is padded: a micro-batch is as many whole pieces as fit its budget of tokens.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import GRADED, SHORTEST_CONTEXT, DataConfig
from lightning_llm.data.mixture import Mixture, SourceStream
from lightning_llm.data.teacher import KeptColumn, TeacherFormat
from lightning_llm.data.token_store import TokenStore, map_file
from lightning_llm.schedules import BatchPlan, Progress, Ramp, as_ramp
from lightning_llm.settings import UserError

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
    segments: list[tuple[int, int]]  # tokens, and of the prefix, of each over all ranks: what attention costs
    samples: int  # units that begin in this window: conversations, pairs, documents' parts of a context's length
    context: int
    responses: int = 0  # over all ranks, where several of a policy's own are drawn for each prompt
    figures: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # to be logged: name -> (sum, count)
    flops: float = 0.0  # spent before the step, over all ranks: responses were drawn and scored


class Feed:
    """One split of one source, as units that a stream can permute.

    A unit is a conversation, a pair, or a document's tokens between two cuts at multiples of the stage's longest
    context; where the context is shorter at first, a unit is cut into pieces of it.
    """

    def __init__(
        self,
        name: str,
        store: TokenStore,
        context: int,
        on_long: str,
        columns: Mapping[str, np.ndarray | KeptColumn],
        longest: int | None = None,
    ):
        """
        Args:
            store: its tokens.
            context: what conversations and pairs have to fit.
            on_long: what becomes of one that does not: drop | truncate_left | stop.
            columns: values beside the tokens, by name: a number or a row of numbers for each.
            longest: the context at whose multiples documents become units; none: `context`.

        Raises:
            UserError: a row does not fit and `on_long` is stop.
        """
        self.name, self.store, self.columns = name, store, columns
        self.longest = longest or context
        self.dropped = 0  # rows that do not fit
        self.rows: np.ndarray | None = None  # the store's row of each unit; none: every row, in order
        self.truncated: np.ndarray | None = None  # tokens that each row loses on its left; none: nothing
        self.lengths = store.row_lengths  # [units] tokens
        if store.form == "text":
            self._cut()
        else:
            self._fit(context, on_long)

    def _cut(self) -> None:
        """Documents into units: all as long as the context but each document's last one."""
        rows, longest = self.store.row_lengths, self.longest
        counts = -(-rows // longest)
        self._ends = counts.cumsum()  # [rows] units up to and with each row
        lengths = np.full(counts.sum(), longest, np.int64)
        lengths[self._ends - 1] = rows - (counts - 1) * longest
        alone = self._ends[(rows > 1) & (lengths[self._ends - 1] == 1)] - 1  # as `next_cut`
        lengths[alone] += 1
        lengths[alone - 1] -= 1
        self.lengths = lengths

    def _fit(self, context: int, on_long: str) -> None:
        """Drop or truncate the rows that need more than `context`."""
        store, needed = self.store, self.store.row_contexts
        fits = needed <= context
        if fits.all():
            return
        if on_long == "stop":
            row = int(np.flatnonzero(~fits)[0])
            raise UserError(
                f"data.sources.{self.name}",
                f"row {row} needs a context of {needed[row]}, the stage has {context}",
                "Raise the context, or set data.on_long to drop or truncate_left",
            )
        if on_long == "truncate_left":  # the first segment gives way, but for one token
            self.truncated = np.maximum(needed - context, 0)
            fits = self.truncated < np.diff(store.offsets)[:: store.segments_per_row]
            self.lengths = self.lengths - self.truncated
        self.rows = np.flatnonzero(fits)
        self.lengths = self.lengths[self.rows]
        self.dropped = int((~fits).sum())

    def begin(self, unit: int) -> int:
        """Where a unit begins in tokens.bin."""
        row, before = self.place(unit)
        return self.store.segment_offsets(row)[0] + before

    def place(self, unit: int) -> tuple[int, int]:
        """The store's row that a unit belongs to, and how many of its tokens lie before the unit."""
        if self.store.form == "text":
            row = int(self._ends.searchsorted(unit, "right"))
            nth = unit - (int(self._ends[row - 1]) if row else 0)
            length = int(self.store.row_lengths[row])
            return row, next_cut((nth - 1) * self.longest, length, self.longest) if nth else 0
        row = unit if self.rows is None else int(self.rows[unit])
        return row, 0 if self.truncated is None else int(self.truncated[row])

    def pieces(self, index: int, unit: int, begin: int, low: int, high: int, context: int) -> Iterator[Piece]:
        """Pieces of a unit that start in [low, high), of its part from `begin` on (all counted from its start)."""
        length = int(self.lengths[unit])
        row, before = self.place(unit)
        start = begin if low <= begin else self.piece_end(unit, low - 1, context)
        while start < min(high, length):
            end = self.piece_end(unit, start, context)
            yield Piece(end - start, index, row, before + start, before + end)
            start = end

    def piece_end(self, unit: int, position: int, context: int) -> int:
        """End of the piece of a unit that holds its token at `position`."""
        length = int(self.lengths[unit])
        return next_cut(position, length, context) if self.store.form == "text" else length

    def targets(self, piece: Piece) -> int:
        """How many targets count in a piece."""
        if self.store.form == "text":
            return piece.length - 1
        if piece.begin:  # truncated, and the first token that is left has nothing to predict it
            first = self.store.token_slice(piece.row).start
            assert self.store.is_target is not None
            return int(self.store.is_target[first + piece.begin + 1 : first + piece.end].sum())
        return int(self.store.target_counts[piece.row])

    def segments(self, piece: Piece) -> list[tuple[int, int]]:
        """(tokens, tokens of its prefix) of a piece's segments: two responses each see the prompt, not the other."""
        first, *responses = [end - begin for begin, end in self.spans(piece)]
        return [(first, 0), *((length, first) for length in responses)]

    def spans(self, piece: Piece) -> list[tuple[int, int]]:
        """Where the piece's segments lie in tokens.bin."""
        offsets = self.store.segment_offsets(piece.row)
        first, last = offsets[0] + piece.begin, offsets[0] + piece.end
        offsets[0], offsets[-1] = first, last
        return [(begin, end) for begin, end in itertools.pairwise(offsets) if end > begin]  # one may be empty


def build_batch(feeds: Sequence[Feed], pieces: Sequence[Piece], columns: Sequence[str] = ()) -> SegmentBatch:
    """The pieces as one batch; without any, a batch in which nothing counts."""
    segments: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    prefix: list[int] = []
    values: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    judged: list[np.ndarray] = []
    for piece in pieces:
        feed = feeds[piece.source]
        store, first = feed.store, len(segments)
        if store.judged is not None:
            judged.append(store.judged[piece.row])
        for i, (begin, end) in enumerate(feed.spans(piece)):
            segments.append(store.ids[begin:end])
            masks.append(None if store.is_target is None else store.is_target[begin:end])
            prefix.append(first if i else -1)
            for name in columns:
                values[name].append(feed.columns[name][begin:end])
    if not segments:
        segments, masks, prefix = [np.zeros(2, np.int64)], [np.zeros(2, bool)], [-1]
        of_token = {name: feeds[0].columns[name] for name in columns}
        values = {name: [np.zeros((2, *column.shape[1:]), column.dtype)] for name, column in of_token.items()}
    batch = SegmentBatch.from_segments(segments, prefix, masks, values)
    if any(feed.store.judged is not None for feed in feeds):
        batch.columns.update(judged_columns(batch, np.array(judged)))
    return batch


def judged_columns(batch: SegmentBatch, judged: np.ndarray) -> dict[str, Tensor]:
    """What is known of rankings, by segment, as int64.

    Returns:
        `strength` [S], of the preference at each prompt (0: unknown), and `grades` [S, C] of each response (-1: none).

    Args:
        judged: [P, 13], rows of judged.bin, one for each prompt; none for a batch in which nothing counts.
    """
    strength = np.zeros(batch.num_segments, np.int64)
    grades = np.full((batch.num_segments, len(GRADED)), -1, np.int64)
    row, response = -1, 0
    for segment, prefix in enumerate(batch.prefixes if len(judged) else ()):
        if prefix < 0:
            row, response = row + 1, 0
            strength[segment] = judged[row, 0]
            continue
        grades[segment] = judged[row, 1:].reshape(-1, len(GRADED))[response]
        response += 1
    return {"strength": torch.from_numpy(strength), "grades": torch.from_numpy(grades)}


def share_out(lengths: Sequence[int], ranks: int, budget: int) -> list[list[int]]:
    """Pieces into micro-batches of about equal size, a multiple of `ranks` of them.

    The longest piece first, always into the emptiest micro-batch (longest processing time, Graham 1969). A micro-batch
    holds at most `budget` tokens; a longer piece goes alone.

    Returns:
        For each micro-batch the indices of its pieces; rank r takes every `ranks`-th from r on.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = ranks * max(min(math.ceil(sum(lengths) / (ranks * budget)), math.ceil(len(lengths) / ranks)), 1)
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
    feed: Feed, context: int, max_tokens: int, units: Iterable[int] | None = None, columns: Sequence[str] = ()
) -> Iterator[tuple[SegmentBatch, np.ndarray]]:
    """A source from its first unit to its last, in batches of at most `max_tokens` (a longer piece goes alone).

    Args:
        units: of the feed, in this order; none: all.

    Yields:
        The batch, and for each of its tokens where it lies in tokens.bin: [T] int64.
    """
    pieces: list[Piece] = []
    tokens = 0
    for unit in range(len(feed.lengths)) if units is None else units:
        for piece in feed.pieces(0, unit, 0, 0, int(feed.lengths[unit]), context):
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

    Source s should have given C_s(t) tokens before step t (`Mixture`). Of its stream of permuted units (`SourceStream`)
    step t takes the pieces that start in [C_s(t), C_s(t + 1)): each piece belongs to one step, none is taken twice, and
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
        teacher: Path | None = None,
    ):
        """
        Args:
            prepared: an artifact of the stage `prepare`.
            context_ramp, batch_ramp: tokens of a piece and of a step, over consumed tokens.
            token_columns: name -> artifact of the stage `score`; its values become a column of the batches.
            teacher: an artifact of the same stage with what a teacher says (`data/teacher.py`); it becomes columns of
                the batches to be trained on, not of those to be validated on.

        Raises:
            UserError: a source is empty, or would be seen more than `data.max_epochs` times.
        """
        self.prepared, self.data, self.seed = Path(prepared), data, seed
        self.context_ramp = as_ramp(context_ramp)
        self.plan = BatchPlan(as_ramp(batch_ramp), total_tokens)
        self.steps = self.plan.steps
        self.token_columns, self.teacher = dict(token_columns or {}), teacher
        self.sources = list(data.sources)
        contexts = [int(entry["value"]) for entry in self.context_ramp]
        if min(contexts) < SHORTEST_CONTEXT:
            raise UserError("context", f"is {min(contexts)}", f"Give at least {SHORTEST_CONTEXT} tokens")
        self.mixture = Mixture({name: source.weight for name, source in data.sources.items()}, total_tokens)
        # Spans are shuffled, not documents: the pieces of one book shall not follow one another through many steps.
        # A cut at a multiple of any of the stage's contexts is one in its span as well, as in its document.
        span = math.lcm(*contexts)
        self.feeds = [self._feed(name, "train", min(contexts), span) for name in self.sources]
        self.dropped = {feed.name: feed.dropped for feed in self.feeds}  # rows longer than the smallest context
        self.epochs: dict[str, float] = {}  # passes over each source
        self._refuse_repetition(total_tokens)
        self.streams = [SourceStream(feed.name, feed.lengths, seed) for feed in self.feeds]
        changes = [self.plan.step_at(entry["at"]) for entry in self.context_ramp]
        self._phases = [(step, context) for step, context in zip(changes, contexts, strict=True)]
        self._entries: list[list[int]] = [
            [] for _ in self.feeds
        ]  # per source and phase: where in the stream its pieces begin
        for phase, (step, _) in enumerate(self._phases):
            for s in range(len(self.feeds)):
                self._entries[s].append(self._consumed(s, step, phase - 1) if phase else 0)

    def _feed(self, name: str, split: str, context: int, span: int) -> Feed:
        store = TokenStore.open(self.prepared / "sources" / name / split)
        columns: dict[str, np.ndarray | KeptColumn] = {}
        for column, artifact in self.token_columns.items():
            path = Path(artifact) / name / split / "logps.bin"
            if not path.is_file() or path.stat().st_size != 4 * store.tokens:
                raise UserError(str(path), f"does not hold one number per token of {name}", "Score the data again")
            columns[column] = map_file(path, np.dtype(np.float32))
        if self.teacher is not None and split == "train":
            columns |= TeacherFormat.read(self.teacher).open(Path(self.teacher) / name)
        return Feed(name, store, context, self.data.on_long, columns, span)

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

    @property
    def rows(self) -> float:
        """Conversations, pairs and documents' parts of a context's length that the stage consumes, about."""
        return sum(self.epochs[feed.name] * len(feed.lengths) for feed in self.feeds)

    def units(self, source: int) -> np.ndarray:
        """The units of a source that any of the steps takes, ascending: [units] int64."""
        target, units = self.mixture.target(self.sources[source], self.plan.total_tokens), self.feeds[source].lengths
        if target >= self.streams[source].tokens:
            return np.arange(len(units))
        taken = itertools.takewhile(lambda entry: entry[1] < target, self.streams[source].units_from(0))
        return np.sort(np.fromiter((unit for unit, _ in taken), np.int64)) if target else np.empty(0, np.int64)

    def context(self, step: int) -> int:
        """The context of a step: the ramp's value where the step begins."""
        return self._phases[self._phase(step)][1]

    def ledger(self, step: int) -> dict[str, int]:
        """Tokens of each source consumed before `step`, exactly."""
        phase = self._phase(max(step - 1, 0))
        return {feed.name: self._consumed(s, step, phase) for s, feed in enumerate(self.feeds)}

    def progress(self, step: int) -> Progress:
        """The counters before `step`."""
        return Progress(tokens=self.plan.boundary(step), samples=sum(self._units_before(step)), steps=step)

    def window(self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch_tokens: int) -> Window:
        """What step `step` consumes, and rank `rank`'s micro-batches of it.

        Raises:
            IndexError: the stage has no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        pieces = [piece for s in range(len(self.feeds)) for piece in self._pieces(s, step)]
        shares = share_out([piece.length for piece in pieces], world_size, micro_batch_tokens)
        columns = list(self.feeds[0].columns)
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
            pairs=sum(self.feeds[piece.source].store.segments_per_row > 1 for piece in pieces),
            consumed=consumed,
            segments=[segment for piece in pieces for segment in self.feeds[piece.source].segments(piece)],
            samples=after.samples - sum(self._units_before(step)),
            context=self.context(step),
        )

    def validation(
        self, context: int, max_tokens: int, limit: int = VALIDATION_TOKENS
    ) -> Iterator[tuple[str, SegmentBatch]]:
        """Held-out rows of each source, in batches of at most `max_tokens`; the same rows at any time of a stage.

        They are the first `limit` tokens of an order that no seed and no stage changes. So stages of one limit, which
        follows from their tokens (`stages/train.py:validation_tokens`), have the same rows where they read the same
        prepared data and context; of two limits the smaller one's rows are among the larger one's.

        Args:
            limit: tokens of each source, about.
        """
        for name in self.sources:
            feed = self._feed(name, "validation", context, context)
            if not len(feed.lengths):
                continue
            stream = SourceStream(name, feed.lengths, seed=0)
            count = stream.units if limit >= stream.tokens else stream.units_before(limit)
            units = [unit for unit, _ in itertools.islice(stream.units_from(0), count)]
            for batch, _ in iterate_batches(feed, context, max_tokens, units, list(self.token_columns)):
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
        for unit, start in self.streams[source].units_from(low):
            if start >= high:
                return
            yield from feed.pieces(source, unit, max(entry - start, 0), low - start, high - start, context)

    def _consumed(self, source: int, step: int, phase: int) -> int:
        """End of the last piece that starts before step `step`, all of whose predecessors are of `phase` or before."""
        target, entry = self._target(source, step), self._entries[source][phase]
        if target <= entry:
            return entry
        unit, start = next(self.streams[source].units_from(target - 1))
        return start + self.feeds[source].piece_end(unit, target - 1 - start, self._phases[phase][1])

    def _units_before(self, step: int) -> list[int]:
        targets = ((s, self._target(s, step)) for s in range(len(self.feeds)))
        return [self.streams[s].units_before(target) if target else 0 for s, target in targets]
