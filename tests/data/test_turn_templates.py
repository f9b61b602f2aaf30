"""Tokenizers without a chat template: turns in their own tokens, ends that are learnt, texts that begin as they say."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.data.turn_templates import TEMPLATES
from lightning_llm.generation.prompts import Prompt, encode_prompt
from lightning_llm.settings import UserError

TALK = [
    {"role": "user", "content": " sum 12 39\n"},
    {"role": "assistant", "content": "51 "},
    {"role": "user", "content": "and 1 1?"},
    {"role": "assistant", "content": "2"},
]
# As the families' reports and model cards show their turns: begin-of-text, end-of-text, turn tokens, the text of TALK.
FAMILIES = {
    "llama3_1": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nsum 12 39<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n51<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nand 1 1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>",
    ),
    "gemma2": (
        "<bos>",
        "<eos>",
        ("<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nsum 12 39<end_of_turn>\n<start_of_turn>model\n51<end_of_turn>\n"
        "<start_of_turn>user\nand 1 1?<end_of_turn>\n<start_of_turn>model\n2<end_of_turn>",
    ),
    "qwen2": (
        "",
        "<|endoftext|>",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_start|>user\nsum 12 39<|im_end|>\n<|im_start|>assistant\n51<|im_end|>\n"
        "<|im_start|>user\nand 1 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>",
    ),
    "of nobody": ("<s>", "</s>", (), ""),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """A base model's tokenizer: the tokens of a family, no chat template. -> (directory, what FAMILIES says)"""
    begin, end, turns, text = FAMILIES[request.param]
    named = {"eos_token": end} | ({"bos_token": begin} if begin else {})
    special = [*named.values(), *turns]
    backend = tokenizers.Tokenizer(models.BPE())
    words = tokenizers.Regex(r" ?\p{L}+|\p{N}|\s*[\r\n]+|\s+|.")  # newlines stay together, as in Llama 3's
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(["user assistant model sum 12 39 and\n\n"] * 9, trainer)
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path, begin, end, text


def test_turns_are_written_in_the_tokenizers_own_tokens_and_their_ends_are_learnt(family):
    directory, begin, _, expected = family
    tokenizer = Tokenizer.load(directory)
    if not expected:
        assert tokenizer.chat_template == ""
        with pytest.raises(UserError, match=r"model\.tokenizer: .* no chat template, and no tokens to open and end"):
            tokenizer.render(TALK)
        return
    end = tokenizer.backend.id_to_token(tokenizer.end_of_turn_id)
    ids, mask = tokenizer.render(TALK)
    assert tokenizer.render_text(TALK) == tokenizer.decode(ids) == expected
    assert ids[: len(tokenizer.begin_ids) + 1].count(tokenizer.backend.token_to_id(begin)) == len(tokenizer.begin_ids)
    assert tokenizer.decode(i for i, counts in zip(ids, mask, strict=True) if counts) == f"51{end}2{end}"
    assert mask[-1]
    assert ids[-1] in tokenizer.stop_ids
    [[prompt, response, other]] = tokenizer.render_pairs([(TALK[:-1], ["2", "3"])])
    assert prompt + response == ids
    assert tokenizer.decode(other) == f"3{end}"
    assert prompt == tokenizer.render(TALK[:-1], add_generation_prompt=True).ids


def test_the_template_goes_with_the_saved_model_and_means_the_same_to_transformers(family, tmp_path_factory):
    from transformers import AutoTokenizer

    directory, _, _, expected = family
    saved = tmp_path_factory.mktemp("saved")
    tokenizer = Tokenizer.load(directory)
    tokenizer.save(saved)
    assert Tokenizer.load(saved).fingerprint == tokenizer.fingerprint
    assert (saved / "chat_template.jinja").exists() == bool(expected)
    if expected:
        theirs = AutoTokenizer.from_pretrained(saved)
        encoded = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
        assert tokenizer.render(TALK) == (encoded["input_ids"], [bool(counts) for counts in encoded["assistant_masks"]])


def test_documents_and_prompts_begin_as_transformers_begins_a_text(family):
    from transformers import AutoTokenizer

    directory, begin, end, _ = family
    tokenizer, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    texts = ["sum 12 39", f"and {begin}\n"]
    for text, document in zip(texts, tokenizer.encode_documents(texts), strict=True):
        prompt = encode_prompt(Prompt("prompt", text), tokenizer, "raw", None)
        assert prompt == theirs(text).input_ids
        assert tokenizer.decode(document) == begin + text + end
        assert document[: len(tokenizer.begin_ids)] == prompt[: len(tokenizer.begin_ids)]
    assert tokenizer.encode_documents(texts[:1]) == [[*theirs(texts[0]).input_ids, theirs.eos_token_id]]
    assert not tokenizer.formatting_ids & set(tokenizer.encode_documents(texts)[1][len(tokenizer.begin_ids) : -1])


def test_roles_that_a_family_has_no_turn_for(family):
    directory, _, _, expected = family
    tokenizer = Tokenizer.load(directory)
    system = [{"role": "system", "content": "Be brief."}, *TALK]
    if "<start_of_turn>" in expected:
        with pytest.raises(UserError, match="knows no turn of the role system"):
            tokenizer.render(system)
    elif expected:
        assert "system" in tokenizer.render_text(system)


MARKED = (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
)
LOOSE = {  # templates of somebody's that do not end what the assistant says, or leave the end out of their marks
    "no end": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "no end, with marks": "{% for m in messages %}{{ m.role + ': ' }}"
    + MARKED
    + "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "behind the marks": "{% for m in messages %}{{ m.role + ': ' }}"
    + MARKED
    + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "the end of a text": "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}


@pytest.mark.parametrize("template", LOOSE.values(), ids=LOOSE.keys())
def test_a_conversation_ends_as_a_pair_does_and_learns_its_end(template, tokenizer):
    loose = Tokenizer(tokenizer.backend, template, tokenizer.settings)
    ids, mask = loose.render(TALK[:2])
    [[prompt, response]] = loose.render_pairs([(TALK[:1], [TALK[1]["content"]])])
    until = len(prompt) + len(response)
    assert prompt + response == ids[:until]
    assert mask[:until] == [False] * len(prompt) + [True] * len(response)
    assert not any(mask[until:])
    assert ids[until - 1] in loose.stop_ids


def test_each_template_ends_turns_in_a_token_that_it_needs():
    for needed, template in TEMPLATES.items():
        assert all(token in template for token in needed)
