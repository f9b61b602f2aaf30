"""Hugging Face directories in and out: config.json <-> ModelConfig, safetensors <-> parameters, family by family."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_llm.models.config import FULL, ROPE_KEYS, SLIDING, ModelConfig, shortest_cycle
from lightning_llm.models.family import FAMILIES, Family
from lightning_llm.settings import UserError

LANGUAGE_MODEL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"  # ends of the classes' names: which head
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")  # as safetensors' headers spell them
USUAL_WINDOW = 4096  # tokens, where a file does not say
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"  # all weights; what is where in several files
WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
SHARD_BYTES = 5_000_000_000  # of one safetensors file; also what writing needs in memory beside the model
# entries of rope_parameters that change nothing; of a pair of mscales that has a 0 the reference uses none
NEUTRAL = {"truncate": True, "partial_rotary_factor": 1.0, "mscale": 0, "mscale_all_dim": 0}

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
    family = FAMILIES[name]
    for key, value in family.constants.items():
        if stored.get(key) not in (None, value):
            raise UserError(f"{path}: {key}", f"{stored[key]!r} is not built yet", f"Only {json.dumps(value)} is read")
    keys = {name: family.renamed.get(name, name) for name in (*family.spelt, "head_dim")}
    values: dict[str, Any] = {name: stored.get(key, family.spelt.get(name)) for name, key in keys.items()}
    if values["num_key_value_heads"] is None:  # files from before grouped queries do not say
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= read_windows(stored, family, path)
    kinds = {entry.name: str(entry.type) for entry in dataclasses.fields(ModelConfig)}
    for field_name, value in values.items():
        if not is_kind(value, kinds[field_name]):
            fact = f"should be of type {kinds[field_name]}, is {value!r}"
            raise UserError(f"{path}: {keys.get(field_name, field_name)}", fact, "Mend the file")
    values["layer_types"] = shortest_cycle(values.get("layer_types", [FULL]))
    try:
        return ModelConfig(
            name=Path(directory).resolve().name,
            family=name,
            rope_parameters=read_rope(stored, values["max_position_embeddings"], path),
            **(family.implied | values),
        )
    except ValueError as error:
        remedy = "Mend the file if it is damaged; otherwise this model asks for what is not built: take another"
        raise UserError(str(path), str(error), remedy) from error


def read_head(directory: str | Path) -> str:
    """Which head a Hugging Face directory says its model has: `LANGUAGE_MODEL`, the default, or `CLASSIFIER`."""
    architectures = read_json(Path(directory) / "config.json").get("architectures") or []
    return CLASSIFIER if any(str(name).endswith(CLASSIFIER) for name in architectures) else LANGUAGE_MODEL


def is_kind(value: Any, kind: str) -> bool:
    """Whether a value from JSON fits a field's annotation; a whole number is a float too, true is no number."""
    kind, _, none = kind.partition(" | ")
    if value is None:
        return none == "None"
    if kind.startswith("list"):
        return isinstance(value, list) and all(is_kind(entry, kind[5:-1]) for entry in value)
    kinds: dict[str, type | tuple[type, ...]] = {"bool": bool, "str": str, "float": (float, int)}
    return isinstance(value, kinds.get(kind, int)) and isinstance(value, bool) == (kind == "bool")


def read_windows(stored: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """`sliding_window` and `layer_types`, from the list of all layers or from what older files say in its place.

    Raises:
        UserError: an older file does not say which layers; names the key.
    """
    if family.windows == "none":
        return {}
    if family.windows == "switched" and not stored.get("use_sliding_window"):
        return {"sliding_window": None, "layer_types": [FULL]}
    types = stored.get("layer_types")
    if types is None and family.windows == "alternating":
        types = [SLIDING, FULL]
    elif types is None:
        full, layers = stored.get("max_window_layers", 28), stored.get("num_hidden_layers")
        for key, value in (("max_window_layers", full), ("num_hidden_layers", layers)):
            if not is_kind(value, "int"):
                raise UserError(f"{path}: {key}", f"should be of type int, is {value!r}", "Mend the file")
        types = [FULL if layer < full else SLIDING for layer in range(layers)]  # pyright: ignore[reportArgumentType]
    is_used = not isinstance(types, list) or SLIDING in types
    window = stored.get("sliding_window", USUAL_WINDOW) if is_used else None
    return {"sliding_window": window, "layer_types": types}


def write_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The same, for every layer; `switched` also as older readers want it, though they know no other order of layers
    than full ones first."""
    if family.windows == "none":
        return {}
    window = config.sliding_window
    if family.windows == "alternating" and window is None:  # the class wants one, though no layer uses it
        window = USUAL_WINDOW
    repeats = -(-config.num_hidden_layers // len(config.layer_types))
    types = (config.layer_types * repeats)[: config.num_hidden_layers]
    values = {"sliding_window": window, "layer_types": types}
    if family.windows == "switched":
        values["use_sliding_window"] = SLIDING in types
        values["max_window_layers"] = types.index(SLIDING) if SLIDING in types else len(types)
    return values


def read_rope(stored: dict[str, Any], longest: int, path: Path) -> dict[str, Any]:
    """`rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (transformers 4).

    Args:
        longest: max_position_embeddings, the original length where the file does not say it.
        path: of the file, for the message.

    Raises:
        UserError: an entry is of another type than it should be; names file and key.
    """
    new, old = stored.get("rope_parameters") or {}, stored.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise UserError(f"{path}: rope_parameters, rope_scaling", "should be JSON objects", "Mend the file")
    parameters = {"rope_theta": stored.get("rope_theta", 10_000.0), **(new or old)}
    if not is_kind(parameters["rope_theta"], "float"):
        raise UserError(f"{path}: rope_theta", f"should be a number, is {parameters['rope_theta']!r}", "Mend the file")
    parameters = {"rope_type": parameters.pop("type", "default"), **parameters}  # "type" is the oldest spelling
    if "original_max_position_embeddings" in ROPE_KEYS.get(parameters["rope_type"], ((), ()))[0]:
        parameters.setdefault("original_max_position_embeddings", longest)
    return {key: value for key, value in parameters.items() if value is not None and NEUTRAL.get(key) != value}


def write_config(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    eos_token_ids: list[int] | None,
    head: str = LANGUAGE_MODEL,
) -> None:
    """config.json and generation_config.json; RoPE and dtype in both spellings, for readers old and new."""
    family = FAMILIES[config.family]
    rope = config.rope_parameters
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    type_name = str(dtype).removeprefix("torch.")
    content: dict[str, Any] = {
        "architectures": [family.architecture.replace(LANGUAGE_MODEL, head)],
        "model_type": family.model_type,
        **{family.renamed.get(name, name): getattr(config, name) for name in family.spelt},
        **({} if config.head_dim is None and "head_dim" not in family.spelt else {"head_dim": config.head_size}),
        **write_windows(config, family),
        **family.constants,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else {**scaling, "type": scaling["rope_type"]},
        "use_cache": True,
        "bos_token_id": None,
        "pad_token_id": None,  # a family's own default would leave that row of the embedding without a gradient
        "eos_token_id": eos_token_ids[0] if eos_token_ids else None,
        "dtype": type_name,
        "torch_dtype": type_name,
    }
    if "query_pre_attn_scalar" in content and config.query_pre_attn_scalar is None:
        content["query_pre_attn_scalar"] = config.head_size
    if head == CLASSIFIER:  # the class reads its score at the last token that is no padding
        content |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        content["pad_token_id"] = eos_token_ids[-1] if eos_token_ids else None
    write_json(directory / "config.json", content)
    generation = {"eos_token_id": eos_token_ids, "pad_token_id": eos_token_ids[-1]} if eos_token_ids else {}
    write_json(directory / "generation_config.json", generation)


# ---- weights ----


def stored_parts(config: ModelConfig, parameters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(key on disk, view of a parameter): names are alike, but on disk queries, keys and values are kept apart.

    So are experts, and each one's gate and up.
    """
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    for name, parameter in parameters.items():
        name = name if name.startswith(("lm_head.", "score.")) else f"model.{name}"
        if ".qkv_proj." in name:
            views = parameter.split([count * config.head_size for count in heads])
            yield from zip((name.replace("qkv", x) for x in "qkv"), views, strict=True)
        elif ".experts." in name:
            block, _, projection = name.partition(".experts.")
            parts = ("gate_proj", "up_proj") if projection == "gate_up_proj.weight" else ("down_proj",)
            for expert, matrix in enumerate(parameter.unbind()):
                for part, view in zip(parts, matrix.chunk(len(parts)), strict=True):
                    yield f"{block}.experts.{expert}.{part}.weight", view
        else:
            yield name, parameter


@torch.no_grad()
def read_weights(directory: Path, config: ModelConfig, parameters: dict[str, Tensor]) -> None:
    """Fill the parameters in place from model.safetensors or its shards, one tensor in memory at a time.

    What is on the meta device has nothing to fill: then the headers are read and compared, and no tensor.

    Raises:
        UserError: a file is missing or damaged, or a key is missing, unknown or of another shape; names both.
    """
    missing = dict(stored_parts(config, parameters))
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if key in missing:
                        read_tensor(path, key, file, missing.pop(key))
                    elif not is_no_parameter(key, config):
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


def is_no_parameter(key: str, config: ModelConfig) -> bool:
    """Whether no parameter comes from a tensor on disk: an old table of RoPE, a head that is the embedding again."""
    return key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and config.tie_word_embeddings)


def read_tensor(path: Path, key: str, file: Any, parameter: Tensor) -> None:
    """Fill a parameter from an open safetensors file, if its header has the parameter's shape.

    Raises:
        UserError: it has another, or its numbers are no plain floating-point ones.
    """
    header = file.get_slice(key)
    if header.get_shape() != list(parameter.shape):
        shapes = f"has shape {header.get_shape()}, config.json asks for {list(parameter.shape)}"
        raise UserError(f"{path}: {key}", shapes, "Use files of one model")
    if header.get_dtype() not in PLAIN_TYPES:
        raise UserError(
            f"{path}: {key}", f"is of type {header.get_dtype()}", "Use the plain, not quantised, checkpoint"
        )
    if not parameter.is_meta:
        parameter.copy_(file.get_tensor(key))


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names.

    Raises:
        UserError: there is neither, or the index names no files beside it.
    """
    if (directory / ONE_FILE).exists():
        return [directory / ONE_FILE]
    index = directory / INDEX
    if not index.exists():
        fact = f"has neither {ONE_FILE} nor {INDEX}"
        raise UserError(str(directory), fact, "Name a directory with weights as safetensors")
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
    """model.safetensors, or shards and their index where the model is larger than one; in place of what was there."""
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
    names = [ONE_FILE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        path = directory / name
        path.touch()  # the library makes files that nobody else may read: others share a store
        mode = path.stat().st_mode
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)
    finish_weights(directory, dict(zip(names, shards, strict=True)), total)


def finish_weights(directory: Path, files: Mapping[str, Collection[str]], total: int) -> None:
    """Complete a directory whose files of weights are written: with the index that several want, and without the files
    of a model that lay there before, which would be read in their place.

    Args:
        files: names of the files -> the tensors in each.
        total: bytes of all tensors.
    """
    if list(files) == [ONE_FILE]:
        (directory / INDEX).unlink(missing_ok=True)
    else:
        weight_map = {key: name for name, keys in files.items() for key in keys}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for path in directory.iterdir():
        if WEIGHT_FILE.fullmatch(path.name) and path.name not in files:
            path.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else.
    """
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
    """Write a JSON object as people read it: indented, in UTF-8, with a newline at its end."""
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
