"""Files beside a model's weights that belong to a model made of it as well: its tokenizer, how it generates."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_llm.models.families import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


def copy_beside(source: Path, target: Path, *names: str) -> None:
    """Copy the tokenizer's files, and others by their `names`, as far as they are there."""
    for name in (*TOKENIZER_FILES, *names):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def end_tokens(directory: Path) -> list[int] | None:
    """Ids of the tokens that end what a model says, by its generation_config.json or config.json; None: unknown."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(directory / name).get("eos_token_id") if (directory / name).is_file() else None
        if found is not None:
            return found if isinstance(found, list) else [found]
    return None
