"""The tokenizer of a run: trained on the recipe's text, or copied from a folder or the hub."""

from __future__ import annotations

from pathlib import Path

from lightning_llm.data.rows import Row
from lightning_llm.data.sources import open_source
from lightning_llm.data.tokenizer import Tokenizer, train_tokenizer
from lightning_llm.settings import UserError
from lightning_llm.stages.config import TokenizerSettings
from lightning_llm.stages.context import StageContext, StageResult


def make_tokenizer(context: StageContext, settings: TokenizerSettings) -> StageResult:
    """Write `tokenizer/` and its fingerprint.

    Raises:
        UserError: there is no text to train on, or the tokenizer cannot be had.
    """
    if settings.source == "train":
        tokenizer = _train(context, settings)
    elif Path(settings.source).expanduser().is_dir():
        tokenizer = Tokenizer.load(Path(settings.source).expanduser())
    else:
        tokenizer = Tokenizer.load(_download(settings.source))
    tokenizer.save(context.output / "tokenizer")
    (context.output / "tokenizer_fingerprint").write_text(tokenizer.fingerprint, "utf-8")
    return StageResult({"vocab_size": tokenizer.vocab_size})


def _train(context: StageContext, settings: TokenizerSettings) -> Tokenizer:
    config = settings.tokenizer
    if not config.sources:
        raise UserError("tokenizer.sources", "names no text", "Give it a source, as {code: {path: embedded:code}}")
    texts: list[str] = []
    for done, (name, source_config) in enumerate(config.sources.items()):
        context.console.update(done, len(config.sources), "sources")
        source = open_source(source_config, f"tokenizer.sources.{name}")
        size = 0
        malformed: UserError | None = None  # they are counted where they are prepared
        for row in source.rows(["train"]):
            if isinstance(row, UserError):
                malformed = malformed or row
            elif not row.is_held_out(settings.validation):
                text = _plain_text(row)
                texts.append(text)
                size += len(text.encode("utf-8"))
                if size >= config.sample_bytes:
                    break
        if malformed and not size:  # not one row can be read: its columns are named wrongly, say
            raise malformed
    try:
        return train_tokenizer(texts, config.vocab_size)
    except ValueError as error:
        raise UserError("tokenizer.vocab_size", str(error), "Raise it") from error


def _plain_text(row: Row) -> str:
    """What the merges are learnt from: the words of a row in any form."""
    content = row.content
    if "text" in content:
        return content["text"]
    messages = content.get("messages") or content["prompt"]
    turns = [line for message in messages for line in (message["role"], message["content"])]
    return "\n".join([*turns, *(content[name] for name in ("chosen", "rejected") if name in content)])


def _download(name: str) -> Path:
    """The tokenizer files of a model on the Hugging Face hub."""
    from huggingface_hub import snapshot_download

    wanted = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            "model.tokenizer",
            f"{name} is no directory here, and cannot be had from the hub ({reason})",
            "Check the name and the connection, or give a directory with tokenizer.json",
        ) from error
