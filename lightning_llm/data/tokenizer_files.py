"""What lies beside tokenizer.json: its settings, and its chat template in any of the places that transformers knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_llm.settings import UserError

NAMED = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))  # as transformers does


def read_settings(path: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; nothing where there is no such file.

    Raises:
        UserError: it is damaged, or a token in it is no text; names file and key.
    """
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"is not JSON ({error})", "Make the file again") from error
    if not isinstance(settings, dict):
        raise UserError(str(path), "is not a JSON object", "Make the file again")
    for key in NAMED:
        value = settings.get(key)
        value = value.get("content", 0) if isinstance(value, dict) else value
        if not isinstance(value, str | None):
            raise UserError(f"{path}: {key}", f"is {settings[key]!r} and not the text of a token", "Mend the file")
    return settings


def read_template(directory: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """The chat template of a directory, empty if it has none, and where it stands.

    Args:
        settings: the content of tokenizer_config.json, where older files keep it.

    Raises:
        UserError: it is no text; names file and key.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(str(path), f"is not text in UTF-8 ({error})", "Make the file again") from error
    place, template = f"{directory / 'tokenizer_config.json'}: chat_template", settings.get("chat_template")
    if isinstance(template, list):  # several named templates: transformers takes the one called default
        named = [entry if isinstance(entry, dict) else {} for entry in template]
        if not all(isinstance(entry.get(key), str) for entry in named for key in ("name", "template")):
            raise UserError(place, "has an entry without a name and a template", "Mend the file")
        template = next((entry["template"] for entry in named if entry["name"] == "default"), None)
    if not isinstance(template, str | None):
        raise UserError(place, f"is {template!r} and not the text of a template", "Mend the file")
    return template or "", place if template else "chat template"
