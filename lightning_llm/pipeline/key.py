"""The key of a node: what decides its artifact, as a hash. Same key, same artifact, wherever and whenever it was made.

In it: settings, keys of the inputs, fingerprints of data and of models from elsewhere, the contract's version.
Not in it: names of nodes, devices, kernels, logging, where files lie. A field that came later says which value means
'as before' (`settings.came_later(0.0)`) and stays out while it has that value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_llm.data.config import STAGE, SourceConfig
from lightning_llm.data.fingerprints import file_sha256, source_fingerprint
from lightning_llm.data.places import is_of_stage, lies_here
from lightning_llm.pipeline.expand import Node
from lightning_llm.settings import AS_BEFORE
from lightning_llm.stages.config import PrepareSettings, TokenizerSettings
from lightning_llm.stages.context import model_directory

CONTRACTS = {
    "prepare": 1,
    "score": 1,
    "train": 1,
    "evaluate": 3,
    "gate": 1,
    "generate": 2,
    "live": 2,  # training with a rollout, in the place of train
    "merge": 3,
    "prune": 1,
    "upcycle": 1,
    "judge": 1,
    "select": 1,
}  # raised when a verb makes other artifacts of the same settings
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
Fingerprint = Callable[[SourceConfig, str], str]


def node_keys(nodes: Sequence[Node], fingerprint: Fingerprint = source_fingerprint) -> dict[str, str]:
    """The key of every node.

    Args:
        nodes: each after its inputs.
        fingerprint: of a source, given the setting that names it.

    Raises:
        UserError: a source or a model of elsewhere is not there.
    """
    keys: dict[str, str] = {}
    for node in nodes:
        inputs = {role: keys[source] if source in keys else outside_key(source) for role, source in node.inputs.items()}
        keys[node.name] = digest(
            {
                "kind": node.kind,
                "contract": CONTRACTS["live" if getattr(node.settings, "rollout", None) is not None else node.kind],
                "settings": _settings(node),
                "inputs": inputs,
                "data": _fingerprints(node, fingerprint),
            }
        )
    return keys


def outside_key(path: str) -> str:
    """sha256 of the files of a model that no node of this plan makes."""
    directory = model_directory(Path(path))
    return _files_key(directory, MODEL_FILES + TOKENIZER_FILES)


def _files_key(directory: Path, patterns: Sequence[str]) -> str:
    found = sorted({path for pattern in patterns for path in directory.glob(pattern)})
    return digest({path.name: file_sha256(path) for path in found})


def _settings(node: Node) -> Any:
    """What a node was told, but for where files lie: their content has a fingerprint."""
    plain = canonical(node.settings)
    if isinstance(node.settings, TokenizerSettings):
        if Path(node.settings.source).is_dir():
            plain["source"] = "files"
        mixture = plain["tokenizer"]
    else:
        mixture = plain.get("data", {})  # of a stage that reads rows
    if "model" in plain:
        del plain["model"]["name"]  # what it is called decides nothing
    mixture.pop("max_epochs", None)  # a permission: what it allows is in the other settings
    for source in mixture.get("sources", {}).values():
        if is_of_stage(source["path"]):
            source["path"] = STAGE  # which one is told by the key among the inputs
        elif source["path"] and lies_here(source["path"]):
            source["path"] = "files"
    return plain


def _fingerprints(node: Node, fingerprint: Fingerprint) -> Any:
    """Of what a node reads besides its inputs."""
    settings = node.settings
    if isinstance(settings, PrepareSettings):
        where = "evaluation.sources" if node.name.startswith("evaluation.") else f"stages.{node.stage}.data.sources"
        sources = {name: source for name, source in settings.data.sources.items() if not is_of_stage(source.path)}
        return {name: fingerprint(source, f"{where}.{name}") for name, source in sources.items()}
    if isinstance(settings, TokenizerSettings):
        if settings.source == "train":
            sources = settings.tokenizer.sources
            return {name: fingerprint(source, f"tokenizer.sources.{name}") for name, source in sources.items()}
        if Path(settings.source).is_dir():
            return _files_key(Path(settings.source), TOKENIZER_FILES)
    return None


def digest(value: Any) -> str:
    """sha256 of a plain value, the same for equal values."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def canonical(value: Any) -> Any:
    """Settings as plain values: 1 and 1.0 are one number, tuples are lists, what is 'as before' is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if not _is_as_before(f, getattr(value, f.name))]
        return {f.name: canonical(getattr(value, f.name)) for f in fields}
    if isinstance(value, dict):
        return {str(name): canonical(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(entry) for entry in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _is_as_before(setting: dataclasses.Field, value: Any) -> bool:
    return AS_BEFORE in setting.metadata and canonical(value) == canonical(setting.metadata[AS_BEFORE])
