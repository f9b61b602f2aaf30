"""Hugging Face directories in and out: config.json <-> ModelConfig, safetensors <-> parameters, family by family."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_llm.models.config import ModelConfig
from lightning_llm.settings import UserError

SHARD_BYTES = 5_000_000_000  # of one safetensors file; also what writing needs in memory beside the model
COPIED = {  # fields spelt alike in config.json: what they are if it does not say (None: it has to)
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


@dataclass(frozen=True)
class Family:
    """A class of transformers' that our files open as."""

    model_type: str
    architecture: str
    implies: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig that config.json does not spell
    constants: dict[str, Any] = field(default_factory=dict)  # keys of config.json that have one value with us


FAMILIES = {
    "qwen2": Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        implies={"attention_bias": True, "num_experts": 0},
        constants={"use_sliding_window": False},
    )
}


def check_family(config: ModelConfig) -> None:
    """Raises UserError where no Hugging Face class has room for a model: none is trained that cannot be kept."""
    where = f"model {config.name}"
    if config.num_experts:
        raise UserError(where, "mixture-of-experts layers are not built yet", "Plan it, or run a dense size")
    if config.family not in FAMILIES:
        raise UserError(f"{where}: family", f"{config.family!r} is not built yet", f"Built are: {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    for key, value in family.implies.items():
        if getattr(config, key) != value:
            fact = f"is {getattr(config, key)}, but {family.architecture} always has {value}"
            raise UserError(f"{where}: {key}", fact, f"Set it to {value}, or choose another family")


# ---- config.json ----


def read_config(directory: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory, in the spelling of transformers 4 or 5.

    Raises:
        UserError: config.json is missing or damaged, or says what no family here can do; names file and key.
    """
    path = Path(directory) / "config.json"
    stored = read_json(path)
    name = next((name for name, family in FAMILIES.items() if family.model_type == stored.get("model_type")), None)
    if name is None:
        known = ", ".join(family.model_type for family in FAMILIES.values())
        raise UserError(f"{path}: model_type", f"{stored.get('model_type')!r} is not built yet", f"Built are: {known}")
    if stored.get("quantization_config"):
        raise UserError(f"{path}: quantization_config", "quantised weights cannot be read", "Use the plain checkpoint")
    for key, value in FAMILIES[name].constants.items():
        if stored.get(key, value) != value:
            raise UserError(f"{path}: {key}", f"{stored[key]!r} is not built yet", f"Only {json.dumps(value)} is read")
    values = {key: stored.get(key, default) for key, default in COPIED.items()}
    if stored.get("head_dim") is not None:
        values["head_dim"] = stored["head_dim"]
    kinds = {entry.name: str(entry.type) for entry in dataclasses.fields(ModelConfig)}
    for key, value in values.items():
        if not is_kind(value, kinds[key]):
            raise UserError(f"{path}: {key}", f"should be of type {kinds[key]}, is {value!r}", "Mend the file")
    try:
        return ModelConfig(
            name=Path(directory).resolve().name,
            family=name,
            rope_parameters=read_rope(stored, path),
            **values,
            **FAMILIES[name].implies,
        )
    except ValueError as error:
        raise UserError(str(path), str(error), "Mend the file") from error


def is_kind(value: Any, kind: str) -> bool:
    """Whether a value from JSON fits a field's annotation; a whole number is a float too, true is no number."""
    kinds: dict[str, type | tuple[type, ...]] = {"bool": bool, "str": str, "float": (float, int)}
    return isinstance(value, kinds.get(kind, int)) and isinstance(value, bool) == (kind == "bool")


def read_rope(stored: dict[str, Any], path: Path) -> dict[str, Any]:
    """`rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (transformers 4)."""
    new, old = stored.get("rope_parameters") or {}, stored.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise UserError(f"{path}: rope_parameters, rope_scaling", "should be JSON objects", "Mend the file")
    parameters = {"rope_theta": stored.get("rope_theta", 10_000.0), **(new or old)}
    if not is_kind(parameters["rope_theta"], "float"):
        raise UserError(f"{path}: rope_theta", f"should be a number, is {parameters['rope_theta']!r}", "Mend the file")
    return {"rope_type": parameters.pop("type", "default"), **parameters}  # "type" is the oldest spelling


def write_config(directory: Path, config: ModelConfig, dtype: torch.dtype, eos_token_ids: list[int] | None) -> None:
    """config.json and generation_config.json; RoPE and dtype in both spellings, for readers old and new."""
    family = FAMILIES[config.family]
    rope = config.rope_parameters
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    type_name = str(dtype).removeprefix("torch.")
    content = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: getattr(config, key) for key in COPIED},
        **({} if config.head_dim is None else {"head_dim": config.head_dim}),
        **family.constants,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else {**scaling, "type": scaling["rope_type"]},
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_token_ids[0] if eos_token_ids else None,
        "dtype": type_name,
        "torch_dtype": type_name,
    }
    write_json(directory / "config.json", content)
    generation = {"eos_token_id": eos_token_ids, "pad_token_id": eos_token_ids[-1]} if eos_token_ids else {}
    write_json(directory / "generation_config.json", generation)


# ---- weights ----


def stored_parts(config: ModelConfig, parameters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(key on disk, view of a parameter): names are alike, but on disk queries, keys and values are kept apart."""
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    for name, parameter in parameters.items():
        name = name if name.startswith("lm_head.") else f"model.{name}"
        if ".qkv_proj." in name:
            views = parameter.split([count * config.head_size for count in heads])
            yield from zip((name.replace("qkv", x) for x in "qkv"), views, strict=True)
        else:
            yield name, parameter


@torch.no_grad()
def read_weights(directory: Path, config: ModelConfig, parameters: dict[str, Tensor]) -> None:
    """Fill the parameters in place from model.safetensors or its shards, one tensor in memory at a time.

    Raises:
        UserError: a file is missing or damaged, or a key is missing, unknown or of another shape; names both.
    """
    missing = dict(stored_parts(config, parameters))
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if key in missing:
                        read_tensor(path, key, file.get_tensor(key), missing.pop(key))
                    elif not (
                        key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and config.tie_word_embeddings)
                    ):
                        raise UserError(
                            f"{path}: {key}", "config.json leaves no place for this tensor", "Use files of one model"
                        )
        except (SafetensorError, OSError) as error:
            raise UserError(
                str(path), f"is not a readable safetensors file ({error})", "Fetch or make it again"
            ) from error
    if missing:
        raise UserError(
            str(directory), f"lacks {len(missing)} tensors, the first {next(iter(missing))}", "Use files of one model"
        )


def read_tensor(path: Path, key: str, stored: Tensor, parameter: Tensor) -> None:
    if stored.shape != parameter.shape:
        shapes = f"has shape {list(stored.shape)}, config.json asks for {list(parameter.shape)}"
        raise UserError(f"{path}: {key}", shapes, "Use files of one model")
    if not stored.is_floating_point():
        raise UserError(f"{path}: {key}", f"is of type {stored.dtype}", "Use the plain, not quantised, checkpoint")
    parameter.copy_(stored)


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        raise UserError(
            str(directory),
            "has neither model.safetensors nor model.safetensors.index.json",
            "Name a directory with weights as safetensors",
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: weight_map", "is missing or empty", "Fetch or make it again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:  # a file never chooses a path
            raise UserError(
                f"{index}: weight_map", f"{name!r} is not the name of a file beside it", "Fetch or make it again"
            )
    return [directory / name for name in sorted(set(names.values()))]


def write_weights(directory: Path, config: ModelConfig, parameters: dict[str, Tensor]) -> None:
    """model.safetensors, or shards and their index where the model is larger than one."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for key, part in stored_parts(config, parameters):
        bytes_ = part.numel() * part.element_size()
        if size and size + bytes_ > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = part.detach().contiguous()
        size, total = size + bytes_, total + bytes_
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / name, metadata={"format": "pt"})
    if count > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(str(path), "is not there", "Name a Hugging Face directory") from None
    except (ValueError, OSError) as error:
        raise UserError(str(path), f"is not readable JSON ({error})", "Fetch or make it again") from error
    if not isinstance(content, dict):
        raise UserError(str(path), "is not a JSON object", "Fetch or make it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
