"""The segment batch, for any documents and groups: who predicts what, what counts, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.batch import SegmentBatch

tokens = st.lists(st.integers(0, 999), min_size=1, max_size=6)
documents = st.lists(tokens, min_size=1, max_size=8)
groups = st.lists(st.tuples(tokens, st.lists(tokens, max_size=4)), min_size=1, max_size=5)


@st.composite
def masked(draw, shape):
    """Segments drawn from `shape` with a mask of as many entries for each, or None."""
    segments = draw(shape)
    masks = [draw(st.none() | st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in segments]
    return segments, masks


def from_groups(drawn, masks=None):
    prompts, responses = zip(*drawn, strict=True)
    return SegmentBatch.from_groups(prompts, responses, masks)


def expected_targets(segments, prefixes, masks):
    """The rule, token by token: (position of the predictor, id, whether it counts, segment, own position)."""
    starts = np.concatenate(([0], np.cumsum([len(s) for s in segments]))).tolist()
    rows = []
    for s, (segment, prefix, mask) in enumerate(zip(segments, prefixes, masks, strict=True)):
        for i, token in enumerate(segment):
            if i:
                predictor = starts[s] + i - 1
            elif prefix >= 0:
                predictor = starts[prefix + 1] - 1  # the prompt's last position
            else:
                continue  # nothing comes before a document's first token
            rows.append((predictor, token, mask is None or bool(mask[i]), s, starts[s] + i))
    return rows


def targets_of(batch):
    fields = (batch.predictors, batch.target_ids, batch.target_mask, batch.target_segment, batch.target_positions)
    return list(zip(*(field.tolist() for field in fields), strict=True))


@given(masked(documents))
def test_documents_predict_all_but_their_first_token(drawn):
    segments, masks = drawn
    batch = SegmentBatch.from_documents(segments, masks)
    assert targets_of(batch) == expected_targets(segments, [-1] * len(segments), masks)
    assert batch.input_ids.tolist() == [token for segment in segments for token in segment]
    assert batch.positions.tolist() == [i for segment in segments for i in range(len(segment))]
    assert batch.cu_seqlens.diff().tolist() == batch.lengths == [len(segment) for segment in segments]
    assert batch.prefix.tolist() == batch.prefixes == [-1] * len(segments)
    assert (batch.num_tokens, batch.num_segments) == (len(batch.input_ids), len(segments))


@given(groups)
def test_groups_are_prompts_followed_by_their_responses(drawn):
    batch = from_groups(drawn)
    segments, prefixes, positions, masks = [], [], [], []
    for prompt, responses in drawn:
        first = len(segments)
        for s in (prompt, *responses):
            is_prompt = len(segments) == first
            positions += range(len(s)) if is_prompt else range(len(prompt), len(prompt) + len(s))
            prefixes.append(-1 if is_prompt else first)
            masks.append([False] * len(s) if is_prompt else None)
            segments.append(s)
    assert batch.input_ids.tolist() == [token for segment in segments for token in segment]
    assert batch.positions.tolist() == positions
    assert batch.lengths == [len(s) for s in segments]
    assert batch.prefix.tolist() == batch.prefixes == prefixes
    assert targets_of(batch) == expected_targets(segments, prefixes, masks)


@given(groups)
def test_every_response_to_a_prompt_supervises_its_first_and_its_last_token(drawn):
    batch = from_groups(drawn)
    targets = {(segment, own): (predictor, counts) for predictor, _, counts, segment, own in targets_of(batch)}
    starts = batch.cu_seqlens.tolist()
    for s, prefix in enumerate(batch.prefixes):
        if prefix >= 0:
            assert targets[s, starts[s]] == (starts[prefix + 1] - 1, True)
            assert targets[s, starts[s + 1] - 1][1]


@given(documents)
def test_the_end_mark_is_always_a_target(drawn):
    batch = SegmentBatch.from_documents([[*document, 1000] for document in drawn])
    counted = batch.target_segment[batch.target_mask & (batch.target_ids == 1000)]
    assert counted.tolist() == list(range(len(drawn)))


@given(groups)
def test_targets_are_the_tokens_that_their_positions_name(drawn):
    batch = from_groups(drawn)
    assert torch.equal(batch.target_ids, batch.input_ids[batch.target_positions])
    starts = batch.cu_seqlens.long()
    assert torch.equal(batch.target_segment, torch.searchsorted(starts, batch.target_positions, right=True) - 1)
    # what predicts stands one position before, in the text if not in the batch
    assert torch.equal(batch.positions[batch.predictors] + 1, batch.positions[batch.target_positions])


@given(masked(documents), st.randoms())
def test_the_order_of_documents_changes_nothing_about_their_targets(drawn, random):
    segments, masks = drawn
    order = random.sample(range(len(segments)), len(segments))
    batch = SegmentBatch.from_documents(segments, masks)
    shuffled = SegmentBatch.from_documents([segments[i] for i in order], [masks[i] for i in order])
    for place, s in enumerate(order):
        for field in ("target_ids", "target_mask"):
            mine = getattr(batch, field)[batch.target_segment == s]
            theirs = getattr(shuffled, field)[shuffled.target_segment == place]
            assert torch.equal(mine, theirs)
    assert shuffled.target_counts == [batch.target_counts[s] for s in order]


@given(masked(documents), st.data())
def test_sums_by_segment_take_only_what_counts(drawn, data):
    batch = SegmentBatch.from_documents(*drawn)
    count = len(batch.target_ids)
    values = torch.tensor(data.draw(st.lists(st.integers(-9, 9), min_size=count, max_size=count)), dtype=torch.float64)
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    for mask in (None, chosen):
        expected = [0.0] * batch.num_segments
        for (_, _, counts, segment, _), value, keep in zip(
            targets_of(batch),
            values.tolist(),
            (chosen if mask is not None else batch.target_mask).tolist(),
            strict=True,
        ):
            expected[segment] += value * (counts and keep)
        assert batch.sum_by_segment(values, mask).tolist() == expected
    assert batch.sum_by_segment(torch.ones(count)).tolist() == batch.target_counts


def test_a_masked_value_may_be_anything_and_gets_no_gradient():
    batch = SegmentBatch.from_documents([[1, 2, 3]], [[1, 0, 1]])
    values = torch.tensor([float("-inf"), -2.0], requires_grad=True)
    batch.sum_by_segment(values).sum().backward()
    assert batch.sum_by_segment(values).tolist() == [-2.0]
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0]


def test_pairs_are_chosen_then_rejected():
    batch = SegmentBatch.from_groups([[1, 2], [5]], [[[3, 4], [9]], [[6, 7], [8]]])
    chosen, rejected = batch.pairs(torch.arange(6))
    assert (chosen.tolist(), rejected.tolist()) == ([1, 4], [2, 5])


def test_pairs_of_segments_in_any_order():
    batch = SegmentBatch.from_segments([[1], [2], [3], [4], [5], [6]], [-1, -1, 1, 0, 0, 1])
    chosen, rejected = batch.pairs(torch.arange(6))
    assert (chosen.tolist(), rejected.tolist()) == ([3, 2], [4, 5])


@pytest.mark.parametrize("responses", [[[[2]]], [[[2], [3], [4]]], [[]]], ids=["one", "three", "none"])
def test_other_than_two_responses_are_no_pair(responses):
    batch = SegmentBatch.from_groups([[1, 1], [5]], [*responses, [[6], [7]]])
    with pytest.raises(ValueError, match="two responses"):
        batch.pairs(torch.zeros(batch.num_segments))


def test_documents_are_no_pairs_but_a_batch_that_only_fills_up_has_none():
    with pytest.raises(ValueError, match="two responses"):
        SegmentBatch.from_documents([[1, 2]]).pairs(torch.zeros(1))
    chosen, rejected = SegmentBatch.from_documents([[1, 2]], [[0, 0]]).pairs(torch.zeros(1))
    assert (len(chosen), len(rejected)) == (0, 0)


def test_token_columns_follow_their_targets():
    batch = SegmentBatch.from_segments(
        [[1, 2], [3, 4], [5]], [-1, 0, 0], token_columns={"reference_logps": [None, [-3.0, -4.0], np.float32([-5])]}
    )
    column = batch.columns["reference_logps"]
    assert column.dtype == torch.float32
    assert dict(zip(batch.target_ids.tolist(), column.tolist(), strict=True)) == {2: 0.0, 3: -3.0, 4: -4.0, 5: -5.0}


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.int64, list, torch.tensor])
def test_segments_may_be_lists_or_arrays(kind):
    make = kind if kind in (list, torch.tensor) else lambda ids: np.asarray(ids, kind)
    batch = SegmentBatch.from_documents([make([1, 65_000]), make([3])])
    assert batch.input_ids.dtype == torch.int64
    assert batch.input_ids.tolist() == [1, 65_000, 3]


def test_a_batch_is_independent_of_the_arrays_it_was_made_from():
    document, prefix = np.array([1, 2, 3]), np.array([-1])
    batch = SegmentBatch.from_segments([document], prefix)
    document[:] = prefix[:] = 7
    assert batch.input_ids.tolist() == [1, 2, 3]
    assert batch.prefix.tolist() == [-1]


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = SegmentBatch.from_segments([[1, 2]], [-1], token_columns={"x": [[0.0, 1.0]]})
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype)
        elif field.name != "columns":
            assert after == before
    assert moved.columns["x"].device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one segment"),
        (([[1], []],), "at least one token"),
        (([[1], [2]], [-1]), "one entry per segment"),
        (([[1], [2]], [-1, 1]), "earlier segment"),
        (([[1], [2]], [1, -1]), "earlier segment"),
        (([[1], [2], [3]], [-1, 0, 1]), "no prefix itself"),
        (([[1, 2]], None, [[True]]), "masks"),
        (([[1, 2], [3]], None, [None]), "masks"),
        (([[1, 2]], None, None, {"logps": [[0.0]]}), "logps"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SegmentBatch.from_segments(*arguments)


def test_ids_that_are_no_whole_numbers_are_refused():
    with pytest.raises(TypeError):
        SegmentBatch.from_documents([[1.5, 2.0]])


def test_a_mask_for_each_response():
    batch = SegmentBatch.from_groups([[1]], [[[2, 3], [4]]], [[[False, True], None]])
    assert dict(zip(batch.target_ids.tolist(), batch.target_mask.tolist(), strict=True)) == {2: False, 3: True, 4: True}
    with pytest.raises(ValueError, match="2 responses has 1 masks"):
        SegmentBatch.from_groups([[1]], [[[2, 3], [4]]], [[None]])
    with pytest.raises(ValueError):
        SegmentBatch.from_groups([[1], [2]], [[[2]]])
