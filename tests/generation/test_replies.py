"""Replies as texts: stop strings over tokens, the order in which they are heard, the conversation over its turns."""

import pytest

from lightning_llm.generation.chat import Conversation
from lightning_llm.generation.config import GenerationConfig, Sampling
from lightning_llm.generation.engine import generate
from lightning_llm.generation.output import InOrder
from lightning_llm.generation.replies import reply_to
from lightning_llm.generation.speaker import load_speaker
from lightning_llm.settings import UserError
from lightning_llm.stages.config import ComputeConfig

PROMPTS = ["the", "the quick brown fox", "dog", "naïvely 🙂"]


def load(talker, **settings):
    return load_speaker(talker, GenerationConfig(**settings), ComputeConfig())


def test_pieces_are_the_reply_and_the_reply_is_the_engines(talker):
    speaker = load(talker, max_new_tokens=40, temperature=1.0, seed=3)
    prompts = [speaker.tokenizer.encode(text) for text in PROMPTS]
    heard = [[] for _ in prompts]
    replies = reply_to(
        speaker, prompts, conversations=[False] * 4, batch_size=3, hear=lambda n, *piece: heard[n].append(piece)
    )
    ids = generate(speaker.model, prompts, max_new_tokens=40, stop_ids=speaker.stop_ids, sampling=Sampling(1.0), seed=3)
    assert [reply.ids for reply in replies] == ids
    for reply, pieces in zip(replies, heard, strict=True):
        said = reply.ids[:-1] if reply.ended_by == "token" else reply.ids
        assert reply.text == "".join(piece for piece, _ in pieces) == speaker.tokenizer.decode(said)
        assert [whole for _, whole in pieces] == [None] * (len(pieces) - 1) + [reply]
        assert (reply.ended_by == "token") == (reply.ids[-1] in speaker.stop_ids)
    assert {reply.ended_by for reply in replies} >= {"length"}


def test_stop_strings_end_each_reply_on_its_own(talker):
    plain = load(talker, max_new_tokens=60)
    prompts = [plain.tokenizer.encode(text) for text in PROMPTS]
    whole = reply_to(plain, prompts, conversations=[False] * 4)
    ids = whole[0].ids
    stop = plain.tokenizer.decode(ids[20:23])[1:]  # begins inside a token or at the next one, and ends two later
    assert len(stop) > 1
    stopped = reply_to(load(talker, max_new_tokens=60, stop=[stop]), prompts, conversations=[False] * 4, batch_size=4)
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text.partition(stop)[0]
        assert (after.ended_by == "string") == (stop in before.text)
        assert after.ids == before.ids[: len(after.ids)]
    assert len(stopped[0].ids) <= 23
    assert stopped[0].ended_by == "string"


def test_only_conversations_end_with_a_turn(talker):
    speaker = load(talker, max_new_tokens=200, temperature=1.0)
    end_of_turn = speaker.tokenizer.end_of_turn_id
    speaker = type(speaker)(**vars(speaker) | {"stop_ids": frozenset({speaker.tokenizer.eos_id})})
    prompts = [speaker.tokenizer.encode("fox")] * 12
    replies = reply_to(speaker, prompts, conversations=[False, True] * 6, batch_size=12)
    in_texts = [end_of_turn in reply.ids for reply in replies[::2]]
    turns = [reply for reply in replies[1::2] if end_of_turn in reply.ids]
    assert any(in_texts)
    assert turns
    assert all(reply.ids.index(end_of_turn) == len(reply.ids) - 1 and reply.ended_by == "token" for reply in turns)


def test_texts_are_printed_in_order(capsys):
    writer = InOrder(["1: ", "2: ", "3: "], "-")
    said = []
    for number, piece, is_last in [(1, "b", False), (0, "a", False), (1, "b", True), (0, "a", True), (2, "c", True)]:
        writer.write(number, piece, is_last)
        said.append(capsys.readouterr().out)
    assert said == ["1: ", "a", "", "a-2: bb-3: ", "c"]


def test_a_conversation_remembers_and_forgets(talker, capsys):
    speaker = load(talker, max_new_tokens=12, system="Be brief.")
    conversation = Conversation(speaker)
    conversation.say("hello")
    first = capsys.readouterr().out
    conversation.say("and now?")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.removesuffix("\n")},
        {"role": "user", "content": "and now?"},
    ]
    ids = speaker.tokenizer.render(messages, add_generation_prompt=True).ids
    [expected] = reply_to(speaker, [ids], conversations=[True])
    assert capsys.readouterr().out == expected.text + "\n"
    conversation.reset()
    conversation.say("hello")
    assert capsys.readouterr().out == first


def test_a_conversation_that_has_become_too_long(talker, capsys):
    conversation = Conversation(load(talker, max_new_tokens=12))
    conversation.say("hello")
    before = list(conversation.messages)
    with pytest.raises(UserError, match="the model's context is 256"):
        conversation.say("fox " * 300)
    assert conversation.messages == before
