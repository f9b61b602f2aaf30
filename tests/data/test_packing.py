"""The windows of a stage: exact ledgers, whole pieces, the same on any number of ranks and from any step."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.packing import Feed, StageData, iterate_batches, next_cut, share_out
from lightning_llm.data.token_store import TokenStore
from lightning_llm.settings import UserError

LOOSE = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
DOCUMENTS = st.lists(st.integers(1, 70), min_size=1, max_size=12)


@pytest.fixture
def stage(tmp_path_factory, write_store):
    """A stage's data made of sources: name -> (form, lengths of the rows' segments)."""

    def build(sources: dict, weights: dict | None = None, **options) -> StageData:
        prepared = tmp_path_factory.mktemp("prepared")
        for i, (name, (form, shape)) in enumerate(sources.items()):
            for split in ("train", "validation"):
                write_store(prepared / "sources" / name / split, form, shape, seed=i)
        config = {name: SourceConfig(weight=(weights or {}).get(name, 1.0)) for name in sources}
        settings_ = {key: options.pop(key) for key in ("on_long", "max_epochs") if key in options}
        data = DataConfig(form="text", sources=config, **{"max_epochs": 1e9, **settings_})
        return StageData(prepared, data, **{"seed": 0, "context_ramp": 16, "batch_ramp": 64, **options})

    return build


def pieces(data: StageData, step: int, ranks: int = 1, budget: int = 40) -> Counter:
    """Every group of segments of a step, over all ranks: what stays together, with what of it is learnt."""
    found: Counter = Counter()
    for rank in range(ranks):
        for batch in data.window(step, rank=rank, world_size=ranks, micro_batch_tokens=budget).mine:
            if not any(batch.target_counts) and batch.num_tokens == 2 and not batch.input_ids.any():
                continue  # fills up a rank's share
            ends, targets, group = batch.cu_seqlens.tolist(), 0, []
            for s, prefix in enumerate(batch.prefixes):
                if prefix < 0 and group:
                    found[(*group, targets)] += 1
                    targets, group = 0, []
                group.append(tuple(batch.input_ids[ends[s] : ends[s + 1]].tolist()))
                targets += batch.target_counts[s]
            found[(*group, targets)] += 1
    return found


@given(length=st.integers(1, 200), context=st.integers(4, 50), data=st.data())
def test_cuts_are_at_multiples_of_the_context_and_leave_no_token_alone(length, context, data):
    cuts, start = [0], 0
    while start < length:
        start = next_cut(start, length, context)
        cuts.append(start)
    assert cuts[-1] == length
    assert all(2 <= b - a <= context for a, b in itertools.pairwise(cuts)) or length == 1
    assert all(cut % context == 0 for cut in cuts[:-2])
    if length % context != 1:
        assert all(cut % context == 0 for cut in cuts[:-1])
    position = data.draw(st.integers(0, length - 1))
    assert next_cut(position, length, context) == min(cut for cut in cuts if cut > position)


@given(lengths=st.lists(st.integers(1, 60), max_size=40), ranks=st.integers(1, 4), budget=st.integers(10, 100))
def test_micro_batches_hold_every_piece_once_and_keep_their_budget(lengths, ranks, budget):
    shares = share_out(lengths, ranks, budget)
    assert len(shares) % ranks == 0
    assert sum(not share for share in shares) < ranks or not lengths
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert all(len(share) == 1 or sum(lengths[i] for i in share) <= budget for share in shares)


def test_pieces_are_spread_evenly_over_ranks():
    loads = [sum(share) for share in share_out([1] * 64, 4, 100)]
    assert len(loads) == 4
    assert [len(share) for share in share_out([1] * 64, 4, 100)] == [16] * 4


@given(
    documents=DOCUMENTS,
    others=DOCUMENTS,
    seed=st.integers(0, 9),
    batch=st.integers(20, 200),
    total=st.integers(300, 900),
)
@LOOSE
def test_text_is_consumed_exactly_and_nothing_twice(stage, documents, others, seed, batch, total):
    weights = {"a": 3.0, "b": 1.0}
    sources = {"a": ("text", documents), "b": ("text", others)}
    data = stage(sources, weights, total_tokens=total, batch_ramp=batch, seed=seed)
    consumed, samples = Counter({"a": 0, "b": 0}), 0
    for step in range(data.steps):
        assert data.ledger(step) == dict(consumed)
        window = data.window(step, micro_batch_tokens=64)
        consumed.update(window.consumed)
        samples += window.samples
        assert window.progress == data.progress(step + 1)
        assert window.progress.samples == samples
        assert sum(b.num_tokens for b in window.mine) == sum(window.consumed.values()) or not window.target_tokens
        assert sum(sum(b.target_counts) for b in window.mine) == window.target_tokens
        for name, weight in weights.items():  # never behind, and at most a piece ahead
            assert -1 <= consumed[name] - weight / 4 * window.progress.tokens < 16 + 1
    assert data.ledger(data.steps) == dict(consumed)
    assert data.progress(data.steps).tokens == total


@given(documents=DOCUMENTS, seed=st.integers(0, 9))
@LOOSE
def test_an_epoch_holds_every_document_once_cut_from_its_own_start(stage, documents, seed):
    tokens = sum(documents)
    data = stage({"a": ("text", documents)}, total_tokens=2 * tokens, batch_ramp=37, seed=seed)
    store = data.feeds[0].store
    expected: Counter = Counter()
    for row in range(store.rows):
        [ids], _ = store.row(row)
        start = 0
        while start < len(ids):
            end = next_cut(start, len(ids), 16)
            expected[(tuple(ids[start:end].tolist()), end - start - 1)] += 2  # two epochs
            start = end
    found = sum((pieces(data, step) for step in range(data.steps)), Counter())
    assert found == expected
    assert data.epochs == {"a": 2.0}


@given(documents=DOCUMENTS, ranks=st.integers(2, 4), budget=st.integers(8, 200), step=st.integers(0, 7))
@LOOSE
def test_any_number_of_ranks_and_any_order_of_asking_give_the_same(stage, documents, ranks, budget, step):
    sources = {"a": ("text", documents), "p": ("pairs", [(5, 3, 4), (2, 6, 1), (7, 2, 2)])}
    walked = stage(sources, total_tokens=512, on_long="drop")
    expected = [pieces(walked, s) for s in range(walked.steps)]
    sought = stage(sources, total_tokens=512, on_long="drop")
    assert pieces(sought, step, ranks, budget) == expected[step]
    windows = [sought.window(step, rank=r, world_size=ranks, micro_batch_tokens=budget) for r in range(ranks)]
    assert len({len(window.mine) for window in windows}) == 1
    assert len({(w.target_tokens, w.pairs, w.samples, str(w.consumed)) for w in windows}) == 1
    assert sum(sum(b.target_counts) for w in windows for b in w.mine) == windows[0].target_tokens


@given(documents=DOCUMENTS, first=st.integers(4, 40), second=st.integers(4, 40), at=st.integers(1, 500))
@LOOSE
def test_where_the_context_changes_nothing_is_lost_or_seen_twice(stage, documents, first, second, at):
    tokens = sum(documents)
    ramp = [{"at": 0, "value": first}, {"at": at, "value": second}]
    data = stage({"a": ("text", documents)}, context_ramp=ramp, batch_ramp=23, total_tokens=2 * tokens)
    consumed = 0
    seen: Counter = Counter()
    for step in range(data.steps):
        window = data.window(step, micro_batch_tokens=64)
        assert data.ledger(step) == {"a": consumed}
        assert window.context == data.context(step) == (first if data.plan.boundary(step) < at else second)
        assert all(length <= window.context for batch in window.mine for length in batch.lengths)
        consumed += window.consumed["a"]
        for segments in pieces(data, step).elements():
            seen.update(segments[0])
    assert consumed == 2 * tokens
    assert seen == Counter({int(i): 2 * n for i, n in Counter(data.feeds[0].store.ids.tolist()).items()})


def test_a_batch_ramp_and_a_weight_ramp(stage):
    weight = [{"at": 0, "value": 0}, {"at": 0.5, "value": 1}]
    ramp = [{"at": 0, "value": 50}, {"at": 500, "value": 100}]
    sources = {"a": ("text", [40] * 20), "b": ("text", [40] * 20)}
    data = stage(sources, {"b": weight}, batch_ramp=ramp, total_tokens=1000)
    assert data.steps == 15
    assert data.ledger(10)["b"] == 0
    assert 250 <= data.ledger(15)["b"] < 266


def test_a_pair_stays_together_and_shares_its_prompt(stage):
    data = stage({"p": ("pairs", [(5, 3, 4), (2, 6, 1), (7, 2, 2)])}, total_tokens=96, batch_ramp=48)
    window = data.window(0, micro_batch_tokens=10)
    assert window.pairs == sum(prefix < 0 for batch in window.mine for prefix in batch.prefixes)
    for batch in window.mine:
        assert all(batch.prefixes[s : s + 3] == [-1, s, s] for s in range(0, batch.num_segments, 3))
        chosen, rejected = batch.pairs(torch.arange(batch.num_segments))
        assert (rejected - chosen).tolist() == [1] * (batch.num_segments // 3)
    store = data.feeds[0].store
    [ids, *_], _ = store.row(0)
    assert any(tuple(ids.tolist()) == group[0] for step in range(2) for group in pieces(data, step))


def test_columns_of_a_score_artifact_follow_their_tokens(stage, tmp_path):
    sources = {"p": ("pairs", [(5, 3, 4), (2, 6, 1), (7, 2, 2)])}
    plain = stage(sources, total_tokens=96)
    store = plain.feeds[0].store
    for split in ("train", "validation"):
        (tmp_path / "p" / split).mkdir(parents=True)
        (store.ids.astype(np.float32) / 7).tofile(tmp_path / "p" / split / "logps.bin")
    options = {"context_ramp": 16, "batch_ramp": 64, "total_tokens": 96, "seed": 0}
    data = StageData(plain.prepared, plain.data, **options, token_columns={"reference_logps": tmp_path})
    batches = [*data.window(0, micro_batch_tokens=30).mine, *(batch for _, batch in data.validation(16, 30))]
    for batch in batches:
        torch.testing.assert_close(batch.columns["reference_logps"], batch.target_ids / 7)
    (tmp_path / "p" / "train" / "logps.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match="does not hold one number per token"):
        StageData(plain.prepared, plain.data, **options, token_columns={"reference_logps": tmp_path})


LONG = {"c": ("conversations", [10, 30, 16, 17])}
LONG_PAIRS = {"p": ("pairs", [(5, 3, 4), (20, 6, 1), (4, 30, 2)])}


def test_long_conversations_and_pairs_are_dropped_and_counted(stage):
    conversations = stage(LONG, total_tokens=128)
    assert conversations.dropped == {"c": 2}
    assert conversations.epochs == {"c": 128 / 26}
    pairs = stage(LONG_PAIRS, total_tokens=128)
    assert pairs.dropped == {"p": 2}
    assert {sum(map(len, group[:-1])) for step in range(2) for group in pieces(pairs, step)} == {12}


def test_long_conversations_and_pairs_lose_their_beginning(stage):
    data = stage(LONG, total_tokens=128, on_long="truncate_left")
    assert data.dropped == {"c": 0}
    store = data.feeds[0].store
    whole = {tuple(store.row(row).segments[0][-16:].tolist()) for row in range(4)}
    assert {group[0] for step in range(2) for group in pieces(data, step)} == whole
    for step in range(data.steps):
        window = data.window(step, micro_batch_tokens=64)
        assert sum(sum(batch.target_counts) for batch in window.mine) == window.target_tokens
    pairs = stage(LONG_PAIRS, total_tokens=128, on_long="truncate_left")
    assert pairs.dropped == {"p": 1}  # a response alone is longer
    shapes = {tuple(map(len, group[:-1])) for step in range(2) for group in pieces(pairs, step)}
    assert shapes == {(5, 3, 4), (10, 6, 1)}


def test_long_conversations_can_stop_the_stage(stage):
    with pytest.raises(UserError, match=r"data\.sources\.c: row 1 needs a context of 30, the stage has 16"):
        stage(LONG, total_tokens=128, on_long="stop")


def test_too_many_epochs_name_the_source(stage):
    sources = {"big": ("text", [100] * 10), "small": ("text", [100])}
    stage(sources, total_tokens=800, max_epochs=4.0)
    with pytest.raises(UserError, match=r"data\.sources\.small: would be seen 4\.5 times \(450 tokens of 100"):
        stage(sources, total_tokens=900, max_epochs=4.0)


def test_a_source_without_rows_is_refused_only_if_it_has_a_weight(stage):
    sources = {"full": ("text", [50]), "empty": ("text", [])}
    stage(sources, {"empty": 0.0}, total_tokens=100).window(0, micro_batch_tokens=64)
    with pytest.raises(UserError, match=r"data\.sources\.empty: has no rows to train on"):
        stage(sources, total_tokens=100)


def test_a_window_may_be_empty_and_a_step_must_exist(stage):
    data = stage({"c": ("conversations", [16])}, total_tokens=64, batch_ramp=8)
    windows = [data.window(step, micro_batch_tokens=64) for step in range(data.steps)]
    assert [sum(window.consumed.values()) for window in windows] == [16, 0] * 4
    assert windows[1].target_tokens == windows[1].pairs == windows[1].samples == 0
    assert [batch.target_counts for batch in windows[1].mine] == [[0]]
    with pytest.raises(IndexError):
        data.window(data.steps, micro_batch_tokens=64)


def test_validation_is_the_same_at_any_time_and_keeps_its_limit(stage):
    data = stage({"a": ("text", [50] * 20), "c": ("conversations", [10] * 20)}, total_tokens=64)
    batches = list(data.validation(16, 40, limit=100))
    again = list(data.validation(16, 40, limit=100))
    assert [name for name, _ in batches] == [name for name, _ in again]
    assert all(torch.equal(a.input_ids, b.input_ids) for (_, a), (_, b) in zip(batches, again, strict=True))
    for name in ("a", "c"):
        assert 90 <= sum(batch.num_tokens for source, batch in batches if source == name) <= 116
    assert all(batch.num_tokens <= 40 for _, batch in batches)
    everything = sum(b.num_tokens for source, b in data.validation(16, 40, limit=10**9) if source == "a")
    assert everything == 1000


@pytest.mark.parametrize("form", ["text", "conversations", "pairs"])
def test_every_token_of_a_source_can_be_found_again(tmp_path, write_store, form):
    write_store(tmp_path, form, [(5, 3, 4)] * 4 if form == "pairs" else [5, 40, 1, 33])
    store = TokenStore.open(tmp_path)
    feed = Feed("s", store, 16, "drop", {})
    seen = []
    for batch, origins in iterate_batches(feed, 16, 30):
        np.testing.assert_array_equal(store.ids[origins], batch.input_ids.numpy())
        seen += origins.tolist()
    fits = [row for row in range(store.rows) if form == "text" or store.row_contexts[row] <= 16]
    assert seen == [i for row in fits for i in range(store.tokens)[store.token_slice(row)]]
