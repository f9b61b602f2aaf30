"""Prompts from the command line and from files, as texts and as conversations."""

import json

import pytest

from lightning_llm.data.tokenizer import Tokenizer, train_tokenizer
from lightning_llm.generation.prompts import Prompt, encode_prompt, read_prompts
from lightning_llm.settings import UserError

TALK = [{"role": "user", "content": "two plus two?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["two plus two is four"] * 20, 280)


def test_texts_and_rows_in_order(tmp_path):
    (tmp_path / "lines.txt").write_text("first\r\n\n  second \n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "more": 1}\n\n{"messages": [' + json.dumps(TALK[0]) + "]}\n")
    assert read_prompts(["x", "y"], None) == [Prompt("prompt 1", "x"), Prompt("prompt 2", "y")]
    lines = str(tmp_path / "lines.txt")
    assert read_prompts(["x"], lines) == [
        Prompt("prompt", "x"), Prompt(f"{lines}:1", "first"), Prompt(f"{lines}:3", "  second ")
    ]  # fmt: skip
    rows = str(tmp_path / "rows.jsonl")
    assert read_prompts([], rows) == [Prompt(f"{rows}:1", "a"), Prompt(f"{rows}:3", TALK)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "found: nothing"),
        ('{"text": "a"}', "found: text"),
        ('{"messages": []}', "neither a prompt nor messages"),
        ('{"messages": [{"role": "user"}]}', "neither a prompt nor messages"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "nothing to answer"),
    ],
)
def test_a_row_that_is_none_is_named(row, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' + row)
    with pytest.raises(UserError, match=said) as caught:
        read_prompts([], str(path))
    assert caught.value.where == f"{path}:2"


def test_no_prompts_and_no_file(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="is missing"):
        read_prompts([], str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts([], str(tmp_path / "nowhere.txt"))


def test_texts_are_continued_and_conversations_rendered(tokenizer):
    text, talk = Prompt("prompt", "two plus two?"), Prompt("prompt", TALK)
    assert encode_prompt(text, tokenizer, "auto", None) == encode_prompt(text, tokenizer, "raw", None)
    assert tokenizer.decode(encode_prompt(text, tokenizer, "auto", "Be brief.")) == "two plus two?"
    rendered = tokenizer.render(TALK, add_generation_prompt=True).ids
    for prompt, template in ((talk, "auto"), (talk, "chat"), (text, "chat")):
        assert encode_prompt(prompt, tokenizer, template, None) == rendered
    system = {"role": "system", "content": "Be brief."}
    for messages in (TALK, [system, *TALK]):  # given once, and not again
        assert (
            encode_prompt(Prompt("prompt", messages), tokenizer, "auto", "Be brief.")
            == tokenizer.render([system, *TALK], add_generation_prompt=True).ids
        )


@pytest.mark.parametrize(
    ("content", "template", "said"),
    [
        (TALK, "raw", "is a conversation"),
        ("", "auto", "is empty"),
        ("a", "chta", "chta"),
        (TALK, "auto", "no chat template"),
    ],
)
def test_what_cannot_be_encoded(content, template, said, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    if said == "no chat template":
        (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=said):
        encode_prompt(Prompt("prompt", content), Tokenizer.load(tmp_path), template, None)


def test_a_text_begins_as_the_tokenizer_says(tokenizer, tmp_path):
    """Llama's and Gemma's tokenizers set a token before a text; transformers does the same."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = Tokenizer.load(tmp_path)
    theirs.backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", theirs.eos_id)]
    )
    theirs.backend.save(str(tmp_path / "tokenizer.json"))
    ids = encode_prompt(Prompt("prompt", "two"), Tokenizer.load(tmp_path), "raw", None)
    assert ids == [theirs.eos_id, *tokenizer.encode("two")]
    assert ids == AutoTokenizer.from_pretrained(tmp_path)("two").input_ids
