"""Text while it comes: the pieces are the text, characters come whole, and no part of a stop string shows."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from lightning_llm.data.tokenizer import train_tokenizer
from lightning_llm.generation.stream import TextStream, begun

TEXT = "naïve 你好 🙂🙃 e\u0301 done"


@pytest.fixture(scope="module")
def by_bytes():
    """A tokenizer of single bytes and some merges, as ours and Qwen's."""
    return train_tokenizer(["done and done"] * 20, 280)


@pytest.fixture(scope="module")
def with_fallback():
    """Decoding as SentencePiece's tokenizers have it: words that begin with ▁, and bytes for what is no word."""
    words = ["▁na", "ve", "▁", "done", "▁done", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def pieces_of(decode, ids, stops=()):
    stream = TextStream(decode, stops)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()], stream


def test_characters_of_several_bytes_come_whole(by_bytes):
    ids = by_bytes.encode(TEXT)
    assert len(ids) > len(TEXT)
    pieces, stream = pieces_of(by_bytes.decode, ids)
    assert "".join(pieces) == stream.text == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in pieces
    assert {"你", "好", "🙂", "🙃"} <= set(pieces)  # each on its own, as soon as its last byte is there


def test_bytes_in_place_of_words(with_fallback):
    of = with_fallback.token_to_id
    spelt = [of(f"<0x{byte:02X}>") for byte in "你🙂".encode()]
    ids = [of("▁na"), *spelt[:3], of("ve"), of("▁done"), *spelt[3:], of("▁"), of("done")]
    pieces, stream = pieces_of(with_fallback.decode, ids)
    assert stream.text == with_fallback.decode(ids) == "na你ve done🙂 done"
    assert {"你", "🙂"} <= set(pieces)


def test_the_text_so_far_is_shown_at_once(by_bytes):
    stream = TextStream(by_bytes.decode)
    assert [stream.push(token) for token in by_bytes.encode("a🙂b")] == ["a", "", "", "", "🙂", "b"]


@given(st.lists(st.integers(3, 258), max_size=40))
def test_pieces_are_the_text_also_of_bytes_that_are_none(by_bytes, ids):
    pieces, stream = pieces_of(by_bytes.decode, ids)
    assert "".join(pieces) == stream.text == by_bytes.decode(ids)


@given(st.lists(st.sampled_from("ab"), max_size=30).map("".join), st.sets(st.sampled_from(["aab", "bb", "abab"])))
def test_a_reply_ends_where_a_stop_string_begins(by_bytes, text, stops):
    stops = sorted(stops)
    pieces, stream = pieces_of(by_bytes.decode, by_bytes.encode(text), stops)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    # the first to be complete ends it; of those that are complete together the one that began first
    cut = min((text[: ends[0]].rfind(s) for s in stops if text[: ends[0]].endswith(s)), default=None) if ends else None
    assert stream.text == (text if cut is None else text[:cut])
    assert stream.is_stopped == (cut is not None)
    shown = ""
    for piece in pieces:  # what is shown is never taken back
        shown += piece
        assert stream.text.startswith(shown)


def test_a_stop_string_over_several_tokens(by_bytes):
    ids = by_bytes.encode("well d o n e! stop here")
    pieces, stream = pieces_of(by_bytes.decode, ids, ["! st"])
    assert stream.text == "well d o n e"
    assert sum(map(len, pieces)) == len(stream.text)


@pytest.mark.parametrize(
    ("text", "held"), [("", 0), ("x", 0), ("x#", 1), ("##", 2), ("a\n", 1), ("#\n", 1), ("a\n#", 1)]
)
def test_what_may_begin_a_stop_string_is_held(text, held):
    assert begun(text, ["###", "\nUser"]) == held
