"""States, which are parameters by name, and how several become one: at once, or tensor by tensor as they are read."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, ParamSpec

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Arguments = ParamSpec("Arguments")
BLOCK = 2**21  # entries that are counted or multiplied at a time: wider copies stay small


class LazyState(Mapping[str, Tensor]):
    """A state whose tensors are computed whenever they are read, in at least fp32, and come in the type of `like`'s.

    So a merge of what lies on disk needs memory for a few tensors of each model (models/shards.py).
    """

    def __init__(self, like: State, tensor: Callable[[str], Tensor]):
        self._like, self._tensor = like, tensor

    def __getitem__(self, name: str) -> Tensor:
        return self._tensor(name).to(dtype_of(self._like, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


class Merge(Generic[Arguments]):
    """A way to make one state of several. Called, it returns a dict; `lazily` leaves each tensor until it is read."""

    def __init__(self, lazily: Callable[Arguments, LazyState]):
        functools.update_wrapper(self, lazily)
        self.lazily = lazily

    def __call__(self, *args: Arguments.args, **named: Arguments.kwargs) -> dict[str, Tensor]:
        """All tensors, now."""
        return dict(self.lazily(*args, **named))


def dtype_of(state: State, name: str) -> torch.dtype:
    """The type of a tensor; what lies on disk tells it without reading the tensor."""
    known: Callable[[str], torch.dtype] | None = getattr(state, "dtype_of", None)
    return state[name].dtype if known is None else known(name)


def wide(tensor: Tensor) -> Tensor:
    """In fp32 if it was narrower: what adds up must not round."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def refuse_unlike(states: Sequence[State]) -> None:
    """Refuse states that have not the same names.

    Raises:
        ValueError: there is none, or one lacks a name or has one more; says which.
    """
    if not states:
        raise ValueError("there is no state to merge")
    for number, state in enumerate(states[1:], start=1):
        if other := state.keys() ^ states[0].keys():
            raise ValueError(f"state {number} and state 0 are of different models: only one has {min(other)}")


def differences(init: State, states: Sequence[State], name: str) -> list[Tensor]:
    """Of one parameter: what each state has moved away from `init`, in at least fp32."""
    start = wide(init[name])
    return [wide(state[name]) - start for state in states]


def layer_of(name: str) -> str:
    """What a parameter belongs to: its block, as `model.layers.3`; embedding, norm and head are each on their own."""
    block = re.match(r"(?:.*\.)?layers\.\d+(?=\.)", name)
    return block[0] if block else name
