"""States, which are parameters by name, and how several become one: at once, or tensor by tensor as they are read."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, ParamSpec

import torch
from torch import Tensor

from lightning_llm.merging.config import BLOCK

State = Mapping[str, Tensor]
Rule = Callable[[Sequence[Tensor]], Tensor]  # the same entries of several states -> what they become
Arguments = ParamSpec("Arguments")


class LazyState(Mapping[str, Tensor]):
    """A state whose tensors are computed whenever they are read, block by block, in at least fp32, and come in the type
    and shape of `like`'s.

    So a merge of what lies on disk (models/shards.py) needs memory for the tensor that it makes and a few blocks.
    """

    def __init__(self, like: State, states: Sequence[State], rule_of: Callable[[str], Rule]):
        """
        Args:
            states: what is merged.
            rule_of: of a parameter's name, how the same entries of all states become one; asked whenever it is read.
        """
        self._like, self._states, self._rule_of = like, states, rule_of

    def __getitem__(self, name: str) -> Tensor:
        rule, first = self._rule_of(name), self._states[0][name]
        merged = torch.empty(first.shape, dtype=dtype_of(self._like, name), device=first.device)
        sources = blocks(self._states, name)
        for place, entries in zip(merged.view(-1).split(BLOCK), sources, strict=True):
            place.copy_(rule(entries))
        return merged

    def dtype_of(self, name: str) -> torch.dtype:
        """The type of a tensor, without computing it."""
        return dtype_of(self._like, name)

    def shape_of(self, name: str) -> list[int]:
        """The shape of a tensor, without computing it."""
        return shape_of(self._like, name)

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


def shape_of(state: State, name: str) -> list[int]:
    """The shape of a tensor; what lies on disk tells it without reading the tensor."""
    known: Callable[[str], list[int]] | None = getattr(state, "shape_of", None)
    return list(state[name].shape) if known is None else known(name)


def refuse_unlike(states: Sequence[State]) -> None:
    """Refuse states that have not the same names and shapes.

    Raises:
        ValueError: there is none, one lacks a name or has one more, or a shape is another one; says which.
    """
    if not states:
        raise ValueError("there is no state to merge")
    for number, state in enumerate(states[1:], start=1):
        if other := state.keys() ^ states[0].keys():
            raise ValueError(f"state {number} and state 0 are of different models: only one has {min(other)}")
        for name in state:
            if (found := shape_of(state, name)) != (first := shape_of(states[0], name)):
                what = f"{name} is {found}, and {first} in state 0"
                raise ValueError(f"state {number} and state 0 are of different models: {what}")


def blocks(states: Sequence[State], name: str) -> Iterator[list[Tensor]]:
    """Of one parameter: the same entries of all states, flat, so many at a time, `widened`."""
    return map(widened, zip(*(state[name].flatten().split(BLOCK) for state in states), strict=True))


def widened(entries: Sequence[Tensor]) -> list[Tensor]:
    """In fp32, or in fp64 if any are: what adds up must not round."""
    wide = torch.float64 if any(some.dtype == torch.float64 for some in entries) else torch.float32
    return [some.to(wide) for some in entries]


def differences(start: Tensor, *others: Tensor) -> list[Tensor]:
    """What each has moved away from the start."""
    return [other - start for other in others]


def layer_of(name: str) -> str:
    """What a parameter belongs to: its block, as `model.layers.3`; embedding, norm and head are each on their own."""
    block = re.match(r"(?:.*\.)?layers\.\d+(?=\.)", name)
    return block[0] if block else name
