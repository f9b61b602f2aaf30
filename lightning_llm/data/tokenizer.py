"""Text to token ids and back, conversations to ids with a mask of what the assistant said: no transformers needed.

A tokenizer is a directory of `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, as
transformers' AutoTokenizer reads it; ids, rendered text and masks are the same as there. One thing differs: what the
assistant says begins with a token of its own, since a model that speaks is given the prompt's tokens first. So blanks
that a template keeps in front of an answer never melt into the prompt's last token. And it always ends in a token that
ends a turn, which is learnt: a template that leaves it out, or out of its marks, would teach an answer without end.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from lightning_llm.data.templates import compile_template
from lightning_llm.data.tokenizer_files import read_settings, read_template
from lightning_llm.data.turn_templates import CHATML, template_for
from lightning_llm.settings import UserError

Message = dict[str, str]  # {"role": ..., "content": ...}

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Spellings of other families, so that a tokenizer from elsewhere is understood; the first in its vocabulary counts.
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>")
ENDS_OF_TURN = (END_OF_TURN, "<|eot_id|>", "<end_of_turn>")

SPAN_MARKS = [chr(code) for code in range(0xE000, 0xE100)]  # private use: two that the text lacks mark a span


class Rendered(NamedTuple):
    """A conversation as ids, and which of them the assistant said (its end-of-turn tokens included)."""

    ids: list[int]
    mask: list[bool]


class Tokenizer:
    """Byte-level BPE with a chat template. `load` a directory or `train_tokenizer` on text."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: str, settings: dict[str, Any]):
        """
        Args:
            backend: what turns text into ids.
            chat_template: jinja; where it lacks `{% generation %}` marks, masks are found by rendering turn by turn.
                Empty: it is written in the tokenizer's own tokens for turns, if they are known (turn_templates.py);
                if not, it stays empty, and conversations are refused.
            settings: the content of tokenizer_config.json, kept as it is.
        """
        self.backend, self.settings = backend, settings
        self.has_chat_template = bool(chat_template)  # of its own
        self.template_place = "chat template"  # for error messages; `load` knows the file
        self.backend.no_padding()
        self.backend.no_truncation()
        self.vocab_size = backend.get_vocab_size()
        self.special_tokens = {
            i: token.content for i, token in sorted(backend.get_added_tokens_decoder().items()) if token.special
        }
        self.formatting_ids = set(self.special_tokens)
        self.eos_id = self._special(ENDS_OF_TEXT, "eos_token")
        self.end_of_turn_id = self._special(ENDS_OF_TURN, "eos_token")
        self.stop_ids = {self.end_of_turn_id, self.eos_id}
        named = backend.token_to_id(self._named_tokens.get("eos_token", ""))
        self.turn_end_ids = self.stop_ids | (set() if named is None else {named})  # whichever a template takes
        begin = backend.encode("a")
        marked = zip(begin.ids, begin.special_tokens_mask, strict=True)
        self.begin_ids = [
            i for i, _ in takewhile(lambda entry: entry[1], marked)
        ]  # of every text, as <bos>; often none
        begin_text = "".join(self.backend.id_to_token(i) or "" for i in self.begin_ids)
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        self.chat_template = chat_template or template_for(added, begin_text)

    # ---- files ----

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """Read a tokenizer from a directory, ours or anyone's.

        Raises:
            UserError: there is no tokenizer.json, or a file cannot be read or holds what it should not; names it.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(str(directory), "has no tokenizer.json", "Give a directory that holds a tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(str(path), f"is not a tokenizer ({error})", "Make the file again") from error
        settings = read_settings(directory / "tokenizer_config.json")
        chat_template, place = read_template(directory, settings)
        tokenizer = cls(backend, chat_template, settings)
        tokenizer.template_place = place
        return tokenizer

    def save(self, directory: Path | str) -> None:
        """Write the three files; without a chat template there are two."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in self.settings.items() if key != "chat_template"}
        (directory / "tokenizer.json").write_text(self._json, "utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), "utf-8")
        template = directory / "chat_template.jinja"
        template.write_text(self.chat_template, "utf-8")
        if not self.chat_template:
            template.unlink()

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json and of the chat template: stages that share data must agree on it."""
        return hashlib.sha256(f"{self._json}\0{self.chat_template}".encode()).hexdigest()

    @functools.cached_property
    def ids_fingerprint(self) -> str:
        """sha256 of tokenizer.json alone: tokenizers that agree on it differ in their chat templates at most."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @functools.cached_property
    def _json(self) -> str:
        return self.backend.to_str(pretty=True)

    def _special(self, spellings: Sequence[str], setting: str) -> int:
        for token in (*spellings, self._named_tokens.get(setting)):
            if token and (found := self.backend.token_to_id(token)) is not None:
                return found
        raise UserError("tokenizer", f"has none of {', '.join(spellings)}", f"Name its {setting} in tokenizer_config")

    # ---- plain text ----

    def encode(self, text: str) -> list[int]:
        """Ids of a text; a special token spelt in it becomes that token, as in transformers."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_start(self, text: str) -> list[int]:
        """The same for what nothing stands before: with the begin-of-text token, if the tokenizer sets one."""
        return [*self.begin_ids, *self.encode(text)]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of documents, on all cores: each begins as `encode_start` does and is closed by the end-of-text token.

        The spelling of a special token inside a document stays plain text: found text cannot end a document early or
        open a turn.
        """
        self.backend.encode_special_tokens = True
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [[*self.begin_ids, *encoding.ids, self.eos_id] for encoding in encodings]
        finally:
            self.backend.encode_special_tokens = False

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens spelt out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    # ---- conversations ----

    def render_text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """A conversation as text; with `add_generation_prompt` it ends where the assistant is to speak."""
        return self._apply(messages, add_generation_prompt)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> Rendered:
        """A conversation as ids and mask."""
        return self.render_many([messages], add_generation_prompt)[0]

    def render_many(
        self, conversations: Sequence[list[Message]], add_generation_prompt: bool = False
    ) -> list[Rendered]:
        """Many conversations as ids and masks, on all cores.

        Where a template lets the assistant's last turn end in nothing, the end-of-turn token is added, and learnt.
        """
        marked = [self._render_spans(messages, add_generation_prompt) for messages in conversations]
        pieces = [self._pieces(text, spans) for text, spans in marked]
        texts = [piece for of_one in pieces for _, piece in of_one]
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        rendered = []
        for messages, (text, spans), of_one in zip(conversations, marked, pieces, strict=True):
            ids, mask = [], []
            span = iter(spans)
            start, end = next(span, (0, 0))
            for begin, _ in of_one:
                encoding = next(encodings)
                ids += encoding.ids
                for position, _ in encoding.offsets:
                    while begin + position >= end and (following := next(span, None)):
                        start, end = following
                    mask.append(start <= begin + position < end)
            is_answered = messages[-1]["role"] == "assistant" and not add_generation_prompt
            if is_answered and self._turn_end(text, spans[-1][0] if spans else 0) is None:
                ids.append(self.end_of_turn_id)
                mask.append(True)
            rendered.append(Rendered(ids, mask))
        return rendered

    def _pieces(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, str]]:
        """Where each piece begins that is encoded for itself, and the piece: a new one where the assistant begins."""
        cuts = [0, *(start for start, _ in spans if not self._begins_texts), len(text)]
        return [(begin, text[begin:end]) for begin, end in pairwise(cuts)]

    @functools.cached_property
    def _begins_texts(self) -> bool:
        """Whether a text begins otherwise than it goes on, as with SentencePiece's blank in front: a piece encoded for
        itself would then not be what it is in its place."""
        alone = self.encode("a")
        return self.encode("\na")[-len(alone) :] != alone

    def render_pairs(self, rows: Sequence[tuple[list[Message], Sequence[str]]]) -> list[list[list[int]]]:
        """Prompts with their responses -> ids [prompt, response, response, ...] of each row. A response ends in a
        token that ends turns; prompt + response is what `render` makes of the whole conversation, up to that token.

        Raises:
            UserError: the template or the tokenizer makes something else of a prompt with its answer than of it alone.
        """
        prompts = self.render_many([prompt for prompt, _ in rows], add_generation_prompt=True)
        answered = [
            [*prompt, {"role": "assistant", "content": response}]
            for prompt, responses in rows
            for response in responses
        ]
        wholes = iter(self.render_many(answered))
        return [
            [prompt.ids] + [self._behind(prompt.ids, next(wholes).ids) for _ in responses]
            for (_, responses), prompt in zip(rows, prompts, strict=True)
        ]

    def _behind(self, prompt: list[int], whole: list[int]) -> list[int]:
        """A conversation's ids behind its prompt, up to the last end of a turn."""
        if whole[: len(prompt)] != prompt:
            raise UserError(
                "chat template",
                "makes other tokens of a prompt alone than of the prompt with its answer, so responses cannot share it",
                "Let add_generation_prompt end where the answer begins, and trim the answer (| trim)",
            )
        response = whole[len(prompt) :]
        ends = (place for place, i in enumerate(response, 1) if i in self.turn_end_ids)
        return response[: max(ends, default=len(response))]

    def _turn_end(self, text: str, begin: int) -> int | None:
        """Where the last turn of a text ends that begins at `begin`: behind its last token that ends turns, if any."""
        ends = ((text.rfind(end, begin), len(end)) for end in self._turn_ends)
        return max((at + length for at, length in ends if at >= 0), default=None)

    @functools.cached_property
    def _turn_ends(self) -> list[str]:
        return [self.backend.id_to_token(i) or "" for i in sorted(self.turn_end_ids)]

    def _render_spans(self, messages: list[Message], add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """Text of a conversation and the character spans [start, end) of what the assistant said."""
        if "{% generation" not in self.chat_template and "{%- generation" not in self.chat_template:
            return self._spans_by_turns(messages, add_generation_prompt)
        contents = "".join(message["content"] for message in messages)
        opening, closing = [mark for mark in SPAN_MARKS if mark not in contents][:2]
        pieces = self._apply(messages, add_generation_prompt, (opening, closing)).split(opening)
        text, spans = pieces[0], []
        for piece in pieces[1:]:
            said, after = piece.split(closing, 1)
            start, text = len(text), text + said
            if self._turn_end(said, 0) is None:  # the end of a turn counts as said, though the marks leave it out
                blanks = after[: len(after) - len(after.lstrip())]
                ends = (blanks + end for end in self._turn_ends if after.startswith(blanks + end))
                left_out = next(ends, "")
                text, after = text + left_out, after.removeprefix(left_out)
            spans.append((start, len(text)))
            text += after
        return text, spans

    def _spans_by_turns(
        self, messages: list[Message], add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        text, spans = self._apply(messages, add_generation_prompt), []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._apply(messages[:i], True)
                upto = self._apply(messages[: i + 1], False)
                upto = upto[: self._turn_end(upto, len(before))]
                if not (upto.startswith(before) and text.startswith(upto)):
                    raise UserError(
                        "chat template",
                        "does not append turn by turn, so what the assistant said cannot be told from the rest",
                        "Mark it in the template with {% generation %} and {% endgeneration %}",
                    )
                spans.append((len(before), len(upto)))
        return text, spans

    def check_template(self, name: str) -> None:
        """Refuse conversations that there is no way to write.

        Args:
            name: of the tokenizer, for the message.

        Raises:
            UserError: there is no chat template, and no tokens of turns that one could be made of.
        """
        if not self.chat_template:
            what = f"{name} has no chat template, and no tokens to open and end turns that are known here"
            remedy = "Name a tokenizer with a chat template, or lay chat_template.jinja beside its tokenizer.json"
            raise UserError("model.tokenizer", what, remedy)

    def _apply(self, messages: list[Message], add_generation_prompt: bool, marks: tuple[str, str] = ("", "")) -> str:
        self.check_template("the tokenizer")
        try:
            return compile_template(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                span_marks=marks,
                **self._named_tokens,
            )
        except Exception as error:  # it is a program of somebody's: whatever goes wrong in it is told as its mistake
            what = " ".join(str(error).split()) or type(error).__name__
            raise UserError(self.template_place, what, "Change the conversation or the template") from error

    @functools.cached_property
    def _named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... as templates know them."""
        named = {key: value for key, value in self.settings.items() if key.endswith("_token")}
        spelt = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        return {key: value for key, value in spelt.items() if isinstance(value, str)}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE on texts; every byte and every digit is a token of its own, so anything can be spelt.

    Args:
        texts: what the merges are learnt from.
        vocab_size: entries, special tokens and bytes included; fewer come out if the text is too short for them.

    Raises:
        ValueError: vocab_size leaves no room for the 256 bytes and the special tokens.
    """
    special = [END_OF_TEXT, START_OF_TURN, END_OF_TURN]
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size must be at least {256 + len(special)}, got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(_batched(texts, 256), trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 5 reads it, and tools of version 4 know it
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": int(1e30),
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(backend, CHATML, settings)


def _batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
