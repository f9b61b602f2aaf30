"""The one batch of all stages: a flat run of tokens cut into segments, where a response continues its prompt."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SegmentBatch:
    """T tokens in S segments, and the N of them that something predicts. Nothing is padded; there are no rows.

    A segment stands alone (a document, a conversation, a prompt) or continues an earlier one, its prefix (a response
    its prompt), whose computation it shares. Every token is a target but the first of a segment without prefix; the
    first token of a response is predicted from its prompt's last position, in each response anew, so N is not T.
    What must not be learnt is masked, never left out.

    Make one with `from_segments`, `from_documents` or `from_groups`.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, counted from the start of the prefix
    cu_seqlens: Tensor  # [S + 1] int32, cumulated lengths of the segments, without their prefixes
    prefix: Tensor  # [S] int64, the segment that this one continues, -1 for none

    predictors: Tensor  # [N] int64, the position whose hidden state predicts the target
    target_ids: Tensor  # [N] int64, always valid ids, also where masked
    target_mask: Tensor  # [N] bool, True where the target counts
    target_segment: Tensor  # [N] int64, ascending
    target_positions: Tensor  # [N] int64, where in input_ids the target itself stands

    columns: dict[str, Tensor]  # what else a loss needs, per target [N] or per segment [S]

    lengths: list[int]  # [S] the same facts as Python numbers, so that nobody waits for a device to learn them
    prefixes: list[int]  # [S]
    target_counts: list[int]  # [S] targets that count

    @classmethod
    def from_segments(
        cls,
        segments: Sequence[ArrayLike],
        prefix: Sequence[int] | None = None,
        masks: Sequence[ArrayLike | None] | None = None,
        token_columns: Mapping[str, Sequence[ArrayLike | None]] | None = None,
    ) -> SegmentBatch:
        """The general constructor, without a Python loop over tokens: it runs for every window of a training.

        Args:
            segments: token ids of each segment.
            prefix: for each segment the index of an earlier one that it continues, or -1. A prefix has none itself.
            masks: for each segment whether each of its tokens counts as a target; None for all.
            token_columns: by name, for each segment one number per token (None: zeros), which become float32, or a
                row of numbers per token, whose type stays; of them the batch keeps those of the targets.

        Raises:
            ValueError: no segments, an empty one, a prefix that is not an earlier segment without prefix, or a mask
                or column of another length than its segment.
        """
        count = len(segments)
        lengths = _lengths(segments)
        if not count or not lengths.all():
            raise ValueError("a batch has at least one segment, and a segment at least one token")
        prefixes = np.full(count, -1) if prefix is None else np.asarray(prefix, np.int64)
        if prefixes.shape != (count,):
            raise ValueError(f"prefix has one entry per segment, got {len(prefixes)} for {count}")
        continuations = np.flatnonzero(prefixes >= 0)
        continued = prefixes[continuations]
        if (prefixes >= np.arange(count)).any() or (prefixes[continued] >= 0).any():
            raise ValueError("a prefix is an earlier segment that has no prefix itself")

        cu_seqlens = np.concatenate(([0], lengths.cumsum()))
        starts, total = cu_seqlens[:-1], int(cu_seqlens[-1])
        shift = -starts
        shift[continuations] += lengths[continued]
        positions = np.arange(total) + shift.repeat(lengths)

        predictor = np.arange(-1, total - 1)
        predictor[starts[continuations]] = cu_seqlens[continued + 1] - 1
        is_target = np.ones(total, bool)
        is_target[starts[prefixes < 0]] = False
        target_positions = np.flatnonzero(is_target)

        input_ids = _per_token(segments, lengths, np.int64, "segments")
        mask = np.ones(total, bool) if masks is None else _per_token(masks, lengths, np.bool_, "masks", missing=True)
        mask = mask[target_positions]
        target_segment = np.arange(count).repeat(lengths)[target_positions]
        columns = {
            name: torch.from_numpy(_column(values, lengths, name)[target_positions])
            for name, values in (token_columns or {}).items()
        }
        return cls(
            input_ids=torch.from_numpy(input_ids),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            prefix=torch.from_numpy(prefixes.copy()),
            predictors=torch.from_numpy(predictor[target_positions]),
            target_ids=torch.from_numpy(input_ids[target_positions]),
            target_mask=torch.from_numpy(mask),
            target_segment=torch.from_numpy(target_segment),
            target_positions=torch.from_numpy(target_positions),
            columns=columns,
            lengths=lengths.tolist(),
            prefixes=prefixes.tolist(),
            target_counts=np.bincount(target_segment[mask], minlength=count).tolist(),
        )

    @classmethod
    def from_documents(
        cls, documents: Sequence[ArrayLike], masks: Sequence[ArrayLike | None] | None = None
    ) -> SegmentBatch:
        """Segments that stand alone. A document's last token, its end mark, is a target as any other."""
        return cls.from_segments(documents, masks=masks)

    @classmethod
    def from_groups(
        cls,
        prompts: Sequence[ArrayLike],
        responses: Sequence[Sequence[ArrayLike]],
        masks: Sequence[Sequence[ArrayLike | None]] | None = None,
    ) -> SegmentBatch:
        """Prompts with any number of responses each: a prompt, its responses, the next prompt. No prompt token counts.

        Args:
            prompts, responses: token ids of each prompt and of its responses.
            masks: for each response whether each of its tokens counts; None for all.

        Raises:
            ValueError: as `from_segments`, or prompts, responses and masks do not match.
        """
        segments: list[ArrayLike] = []
        prefix: list[int] = []
        token_masks: list[ArrayLike | None] = []
        response_masks = [[None] * len(group) for group in responses] if masks is None else masks
        for prompt, group, group_masks in zip(prompts, responses, response_masks, strict=True):
            if len(group_masks) != len(group):
                raise ValueError(f"a prompt with {len(group)} responses has {len(group_masks)} masks")
            prefix += [-1] + [len(segments)] * len(group)
            segments += [prompt, *group]
            token_masks += [np.zeros(np.size(prompt), bool), *group_masks]
        return cls.from_segments(segments, prefix, token_masks)

    @property
    def num_tokens(self) -> int:
        """T, the prompts that are shared counted once."""
        return self.input_ids.shape[0]

    @property
    def num_segments(self) -> int:
        """How many segments, prompts and continuations alike."""
        return len(self.lengths)

    @property
    def extents(self) -> list[tuple[int, int]]:
        """(tokens, tokens of its prefix) of every segment: what attention costs."""
        prefixes = (self.lengths[prefix] if prefix >= 0 else 0 for prefix in self.prefixes)
        return list(zip(self.lengths, prefixes, strict=True))

    def to(self, device: torch.device | str) -> SegmentBatch:
        """The same batch with its tensors on `device`."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        return dataclasses.replace(self, **moved, columns=columns)

    def sum_by_segment(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sums of `values` [N] over the targets that count, and that `mask` [N] selects, in each segment -> [S]."""
        counted = self.target_mask if mask is None else self.target_mask & mask
        sums = values.new_zeros(self.num_segments)
        return sums.index_add(0, self.target_segment, values.where(counted, values.new_zeros(())))

    def pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of `values` [S] those of the first and of the second response to each prompt: chosen [P], rejected [P].

        A batch in which nothing is continued and nothing counts, as fills up a rank's share, has no pairs.

        Raises:
            ValueError: a prompt has another number of responses than two.
        """
        chosen, rejected = self.groups(values, 2).unbind(1)
        return chosen, rejected

    def groups(self, values: Tensor, size: int | None = None) -> Tensor:
        """Of `values` [S] those of the responses, by prompt [P, G].

        A batch in which nothing is continued and nothing counts, as fills up a rank's share, has no groups [0, G].

        Args:
            size: G; None: as many as the first prompt has.

        Raises:
            ValueError: a prompt has another number of responses.
        """
        responses = Counter(p for p in self.prefixes if p >= 0)
        size = size or next(iter(responses.values()), 1)
        if responses or any(self.target_counts):
            for segment, prefix in enumerate(self.prefixes):
                if prefix < 0 and responses[segment] != size:
                    what = "a pair is two responses to a prompt" if size == 2 else f"prompts have {size} responses each"
                    raise ValueError(f"{what}; segment {segment} has {responses[segment]}")
        return values[self._responses(values.device)].view(-1, size)

    def to_targets(self, grouped: Tensor) -> Tensor:
        """Of a value per response [P, G], ordered as by `groups`, that of every target's response [N]; in prompts 0."""
        by_segment = grouped.new_zeros(self.num_segments)
        return by_segment.index_copy(0, self._responses(grouped.device), grouped.flatten())[self.target_segment]

    def _responses(self, device: torch.device) -> Tensor:
        """Segments that continue a prompt, by prompt: a stable sort, as they need not stand next to one another."""
        order = sorted((s for s, p in enumerate(self.prefixes) if p >= 0), key=self.prefixes.__getitem__)
        return torch.tensor(order, dtype=torch.int64, device=device)


def _lengths(arrays: Sequence[Any]) -> np.ndarray:
    return np.fromiter(map(len, arrays), np.int64, len(arrays))


def _column(arrays: Sequence[Any], lengths: np.ndarray, name: str) -> np.ndarray:
    """The arrays one after the other: numbers as float32 [T], rows of numbers in their own type [T, ...]."""
    first = next((np.asarray(array) for array in arrays if array is not None), None)
    if first is None or first.ndim == 1:
        return _per_token(arrays, lengths, np.float32, name)
    if len(arrays) != len(lengths) or any(array is None for array in arrays) or (_lengths(arrays) != lengths).any():
        raise ValueError(f"{name} does not match the segments: one row per token of each segment")
    return np.concatenate(arrays)


def _per_token(
    arrays: Sequence[Any], lengths: np.ndarray, dtype: type[np.generic], name: str, missing: float = 0
) -> np.ndarray:
    """The arrays one after the other; where one is None, its segment's length of `missing`."""
    if len(arrays) == len(lengths):
        if any(array is None for array in arrays):
            filler = np.full(lengths.max(), missing, dtype)
            arrays = [filler[:n] if a is None else a for a, n in zip(arrays, lengths.tolist(), strict=True)]
        if (_lengths(arrays) == lengths).all():
            casting = "unsafe" if dtype is np.bool_ else "same_kind"  # a mask may be 0 and 1, an id never 1.5
            return np.concatenate(arrays, dtype=dtype, casting=casting)
    raise ValueError(f"{name} does not match the segments: one entry per segment, as long as the segment")
