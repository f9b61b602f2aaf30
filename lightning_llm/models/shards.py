"""A model's tensors where they lie, in safetensors files: read one at a time, written one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_llm.models.families import PLAIN_TYPES, finish_weights, is_no_parameter, read_config, weight_files
from lightning_llm.settings import UserError

TYPES: dict[str, torch.dtype] = dict(
    zip(PLAIN_TYPES, (torch.float64, torch.float32, torch.float16, torch.bfloat16), strict=True)
)
ALIGNMENT = 8  # bytes: where a file's tensors begin


class Shards(Mapping[str, Tensor]):
    """The state in a Hugging Face directory, by the names on disk. A tensor is read whenever it is asked for.

    What no parameter comes from is left out: old tables of RoPE, a head that is the embedding once more.
    """

    def __init__(self, directory: Path):
        """Read the headers.

        Raises:
            UserError: a file is missing or damaged, or holds other numbers than plain floating-point ones.
        """
        self.directory = directory
        self._files: dict[str, Any] = {}  # name of a file -> it, open
        self._places: dict[str, str] = {}  # tensor -> name of its file
        self._headers: dict[str, tuple[list[int], str]] = {}  # tensor -> shape and type, as the header has them
        config = read_config(directory)
        for path in weight_files(directory):
            try:
                file = self._files[path.name] = safe_open(path, framework="pt")
                for name in file.keys():
                    if not is_no_parameter(name, config):
                        header = file.get_slice(name)
                        self._places[name] = path.name
                        self._headers[name] = header.get_shape(), header.get_dtype()
            except (SafetensorError, OSError) as error:
                what = f"is not a readable safetensors file ({error})"
                raise UserError(str(path), what, "Fetch or make it again") from error
        for name, (_, kind) in self._headers.items():
            if kind not in TYPES:
                where = f"{directory / self._places[name]}: {name}"
                raise UserError(where, f"is of type {kind}", "Use the plain, not quantised, checkpoint")

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._places[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def dtype_of(self, name: str) -> torch.dtype:
        """The type of a tensor, by its header."""
        return TYPES[self._headers[name][1]]

    def shape_of(self, name: str) -> list[int]:
        """The shape of a tensor, by its header."""
        return self._headers[name][0]

    @property
    def files(self) -> dict[str, list[str]]:
        """Names of the files -> the tensors in each."""
        found: dict[str, list[str]] = {name: [] for name in self._files}
        for name, file in self._places.items():
            found[file].append(name)
        return {file: names for file, names in found.items() if names}


def refuse_unlike_shards(states: Sequence[Shards]) -> None:
    """Refuse directories whose tensors are not those of the first.

    Raises:
        UserError: one lacks a tensor, has one more, or one of another shape; names it.
    """
    first = states[0]
    for other in states[1:]:
        if only := first.keys() ^ other.keys():
            name = min(only)
            has, lacks = (first, other) if name in first else (other, first)
            raise UserError(
                f"{lacks.directory}: {name}", f"is missing, {has.directory} has it", "Merge models of one architecture"
            )
        for name in first:
            if other.shape_of(name) != first.shape_of(name):
                shapes = f"has shape {other.shape_of(name)}, in {first.directory} {first.shape_of(name)}"
                raise UserError(f"{other.directory}: {name}", shapes, "Merge models of one architecture")


def write_shards(
    directory: Path, state: Mapping[str, Tensor], like: Shards, done: Callable[[int], None] = lambda count: None
) -> None:
    """Write a state in the files, types and order of another, tensor by tensor, with the index that files want.

    Args:
        state: with the names of `like`; each tensor is asked for once.
        done: told how many tensors are written.
    """
    count, total = 0, 0
    for file, names in like.files.items():
        # wide types first, as the format's own writer has them: all then begin at multiples of their size
        ordered = sorted(names, key=lambda name: (-like.dtype_of(name).itemsize, name))
        with (directory / file).open("wb") as out:
            out.write(header_of(like, ordered))
            for name in ordered:
                tensor = state[name].to(like.dtype_of(name)).contiguous()
                total += out.write(tensor.flatten().view(torch.uint8).numpy().data)
                del tensor  # before the next one is made
                count += 1
                done(count)
    finish_weights(directory, like.files, total)


def header_of(like: Shards, names: Sequence[str]) -> bytes:
    """The beginning of a safetensors file: its length as a 64-bit number, then what lies where, as JSON."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kinds, at = {kind: name for name, kind in TYPES.items()}, 0
    for name in names:
        kind, shape = like.dtype_of(name), like.shape_of(name)
        end = at + kind.itemsize * torch.Size(shape).numel()
        content[name] = {"dtype": kinds[kind], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
