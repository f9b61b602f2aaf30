"""What was written is what is read, and every token has an address."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_llm.data.token_store import TokenStore, TokenStoreWriter
from lightning_llm.settings import UserError

SEGMENT = st.lists(st.tuples(st.integers(0, 69_999), st.booleans()), min_size=1, max_size=9)


@pytest.mark.parametrize("form", ["conversations", "pairs"])
@pytest.mark.parametrize("vocabulary", [65_536, 70_000])
@given(data=st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_come_back(tmp_path_factory, form, vocabulary, data):
    rows = data.draw(st.lists(st.lists(SEGMENT, min_size=3, max_size=3), max_size=5))
    rows = rows if form == "pairs" else [row[:1] for row in rows]
    directory = tmp_path_factory.mktemp("store")
    writer = TokenStoreWriter(directory, form, vocabulary)
    for number, row in enumerate(rows):
        ids = [[i % vocabulary for i, _ in segment] for segment in row]
        writer.append(ids, [[counts for _, counts in segment] for segment in row], {"number": number})
    writer.close()
    store = TokenStore.open(directory)
    assert (store.rows, store.tokens, store.targets) == tuple(writer.facts().values())
    for number, row in enumerate(rows):
        segments, masks = store.row(number)
        assert [ids.tolist() for ids in segments] == [[i % vocabulary for i, _ in segment] for segment in row]
        assert [mask.tolist() for mask in masks if mask is not None] == [[c for _, c in segment] for segment in row]
        np.testing.assert_array_equal(store.ids[store.token_slice(number)], np.concatenate(segments))
        first_is_target = row[0][0][1]
        assert store.target_counts[number] == sum(c for segment in row for _, c in segment) - first_is_target
        lengths = [len(segment) for segment in row]
        assert store.row_lengths[number] == sum(lengths)
        assert store.row_contexts[number] == lengths[0] + max(lengths[1:], default=0)
    assert [row.get("number", n) for n, row in enumerate(store.metadata())] == list(range(len(rows)))


def test_ids_are_as_narrow_as_the_vocabulary_allows(tmp_path, write_store):
    write_store(tmp_path, "text", [4])
    store = TokenStore.open(tmp_path)
    assert store.ids.dtype == np.uint16
    assert store.is_target is None
    assert store.row(0).masks == [None]
    assert (tmp_path / "tokens.bin").stat().st_size == 8


def test_a_store_that_was_not_closed_is_none(tmp_path):
    writer = TokenStoreWriter(tmp_path, "text", 10)
    writer.append([[1, 2]])
    writer.abandon()
    with pytest.raises(UserError, match="no token store"):
        TokenStore.open(tmp_path)
