"""A model that speaks: weights, tokenizer and what its generation_config.json says, read from one directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.generation.config import GenerationConfig, Sampling
from lightning_llm.generation.engine import Sampler
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.config import check_scaling, set_rope_scaling
from lightning_llm.models.families import read_json
from lightning_llm.models.kernels import use_attention
from lightning_llm.settings import UserError

if TYPE_CHECKING:
    from lightning_llm.stages.config import ComputeConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNUSED = {"devices": 1, "compile": False, "activation_checkpointing": "none"}  # of compute; for training alone
NEW_TOKENS = ", new tokens by torch's products"  # one query at a time needs no kernel: generation/cache.py
UNHEARD = {"no_repeat_ngram_size": 0, "typical_p": 1.0, "num_beams": 1}  # of generation_config.json; neutral


@dataclass(frozen=True)
class Speaker:
    """A loaded model and how it speaks."""

    model: Transformer
    tokenizer: Tokenizer
    config: GenerationConfig
    sampling: Sampling
    stop_ids: frozenset[int]  # that end a text
    context: int | None  # tokens of prompt and reply together; none: any number

    @cached_property
    def sampler(self) -> Sampler:
        """One for all turns of a chat: weights are laid out for it once."""
        return Sampler(self.model)

    @property
    def turn_stop_ids(self) -> frozenset[int]:
        """Tokens that end a turn of a conversation."""
        return self.stop_ids | {self.tokenizer.end_of_turn_id}

    def check(self, where: str, ids: list[int]) -> None:
        """Refuse a prompt that the model cannot read.

        Raises:
            UserError: it is too long, or has ids that the model has no embedding for.
        """
        if self.context is not None and len(ids) >= self.context:
            raise UserError(
                where,
                f"has {len(ids):,} tokens, and the model's context is {self.context:,}",
                "Shorten it, or read further with dual_chunk.chunk_size or rope_scaling",
            )
        if max(ids) >= self.model.config.vocab_size:
            raise UserError(
                where,
                f"token {max(ids)} is none of the model's {self.model.config.vocab_size:,}",
                "Use the tokenizer that belongs to the model",
            )


def load_speaker(directory: Path, config: GenerationConfig, compute: ComputeConfig) -> Speaker:
    """Read a Hugging Face directory; says on stderr what attention is computed with, and what is left out.

    Args:
        config: how it is to speak.
        compute: device, precision, attention and threads.

    Raises:
        UserError: a file is missing or damaged, a setting does not fit the model or the device, or there is no such
            device.
    """
    if compute.precision not in PRECISIONS:
        raise UserError("compute.precision", f"is {compute.precision!r}", f"Give {' or '.join(PRECISIONS)}")
    if compute.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("compute", "torch sees no GPU", "Use compute=cpu")
    for name, neutral in UNUSED.items():
        if getattr(compute, name) != neutral:
            fact = f"is {getattr(compute, name)}, and does nothing where a model only speaks"
            raise UserError(f"compute.{name}", fact, f"Leave it at {neutral}")
    if compute.threads:
        torch.set_num_threads(compute.threads)
    if config.rope_scaling is not None:
        try:
            check_scaling(config.rope_scaling)
        except ValueError as error:
            remedy = "Give {rope_type: linear, factor: ...} or another, with all that it needs"
            raise UserError("rope_scaling", str(error), remedy) from error
    tokenizer = Tokenizer.load(directory)
    model = Transformer.from_pretrained(directory, PRECISIONS[compute.precision]).eval()
    context = context_of(model.config)
    if config.rope_scaling is not None:
        context = stretched_context(model.config, config.rope_scaling)
        model.config = set_rope_scaling(model.config, config.rope_scaling)
    model = model.to("cuda" if compute.accelerator == "gpu" else "cpu")
    kernel = use_attention(model, compute, precision=compute.precision, needs_gradient=False) + NEW_TOKENS
    if config.dual_chunk.chunk_size is not None:
        kernel = f"attention by dual chunks of {config.dual_chunk.chunk_size:,} positions (dual_chunk.chunk_size)"
    print(f"note: {kernel}", file=sys.stderr)
    path = directory / "generation_config.json"
    defaults = read_json(path) if path.is_file() else {}
    for name, neutral in UNHEARD.items():
        if defaults.get(name, neutral) not in (neutral, None):
            print(f"note: {path.name} has {name} {defaults[name]}, which is not built: left out", file=sys.stderr)
    try:
        sampling = config.sampling(defaults)
    except ValueError as error:
        raise UserError(str(path), str(error), "Mend it, or give the setting yourself") from error
    stop_ids = read_stop_ids(directory, defaults) or tokenizer.stop_ids
    is_unbounded = config.dual_chunk.chunk_size is not None
    return Speaker(model, tokenizer, config, sampling, frozenset(stop_ids), None if is_unbounded else context)


def read_stop_ids(directory: Path, defaults: dict[str, Any]) -> set[int]:
    """`eos_token_id`, a number or a list: of generation_config.json, else of config.json.

    Raises:
        UserError: it is neither.
    """
    for name, stored in (("generation_config.json", defaults), ("config.json", read_json(directory / "config.json"))):
        ids = stored.get("eos_token_id")
        if ids is not None:
            listed = ids if isinstance(ids, list) else [ids]
            if any(isinstance(each, bool) or not isinstance(each, int) for each in listed):
                raise UserError(f"{directory / name}: eos_token_id", f"is {ids!r}", "Give a number, or a list of them")
            return set(listed)
    return set()


def context_of(config: ModelConfig) -> int:
    """Tokens that a model has positions for as its files say.

    The length that its scaling began at times the factor, if that is more than max_position_embeddings: files with YaRN
    often leave that at the length of before. Interpolation (`linear`) has no such length, so its factor is in
    max_position_embeddings already, and does not count again.
    """
    rope = config.rope_parameters
    reach = rope.get("original_max_position_embeddings", 0) * rope.get("factor", 1)
    return max(config.max_position_embeddings, int(reach))


def stretched_context(config: ModelConfig, scaling: dict[str, Any]) -> int:
    """Tokens that the model has positions for with `scaling` in the place of its own, whose factor goes first."""
    own, original = config.rope_parameters, "original_max_position_embeddings"
    length = context_of(config) / own.get("factor", 1)
    if scaling.get(original) != own.get(original):
        length = scaling.get(original, length)
    return int(length * scaling.get("factor", 1))
