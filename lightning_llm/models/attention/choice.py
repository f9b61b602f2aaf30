"""Which backend serves a request, and why not another one."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

from lightning_llm.models.attention.flash import Flash
from lightning_llm.models.attention.flex import Flex
from lightning_llm.models.attention.request import Backend, Request
from lightning_llm.models.attention.sdpa import Sdpa
from lightning_llm.models.attention.varlen import Varlen
from lightning_llm.settings import UserError

BACKENDS: dict[str, Backend] = {"flash": Flash(), "varlen": Varlen(), "flex": Flex(), "sdpa": Sdpa()}

# Fastest first for what recipes mostly train on: documents of unlike length, prompts with their responses. There, on a
# GPU, flash-attn's kernel and torch's copy of it take a batch as it lies; flex computes whole tiles of it, sdpa what
# its rows pad. Rows of one length, a single long document too, are sdpa's, which then pads nothing (performance.md).
# Which it will be is not known when a model is built. On a CPU, flex has no kernel that trains.
ORDER = {"cuda": ("flash", "varlen", "flex", "sdpa"), "cpu": ("sdpa", "flex", "flash", "varlen")}

FIRST = {  # why the first of ORDER is
    "cuda": "the fastest on a GPU for documents of unlike length",
    "cpu": "the fastest on a CPU, and trains",
}


@lru_cache
def choose_backend(backend: str, request: Request) -> str:
    """The name of the backend that serves a request; never another one than was asked for.

    Args:
        backend: a name in BACKENDS, or "auto": the first of ORDER that can.
        request: what is asked.

    Raises:
        UserError: the backend is unknown, cannot do what is asked, or is installed and broken.
    """
    refused: dict[str, str] = {}
    for name in candidates(backend, request):
        reason = BACKENDS[name].refuses(request)
        if reason is None:
            return name
        refused[name] = reason
    remedy = "Set compute.attention=auto" if backend != "auto" else "Use another device or precision"
    raise UserError("compute.attention", "; ".join(f"{name} {reason}" for name, reason in refused.items()), remedy)


def explain(backend: str, requests: Collection[Request]) -> str:
    """One line for a reader: the backends of a model's layers, and what those that would come first lack.

    Args:
        backend: as in `choose_backend`.
        requests: what the model's kinds of layers ask; at least one.

    Raises:
        UserError: as `choose_backend`.
    """
    chosen: dict[str, None] = {}  # in order, without repetition
    passed_over: dict[str, None] = {}
    for request in requests:
        name = choose_backend(backend, request)
        chosen[name] = None
        if backend == "auto":
            for other in candidates(backend, request):
                if other == name:
                    break
                passed_over[f"{other} {BACKENDS[other].refuses(request)}"] = None
    first = FIRST.get(next(iter(requests)).device, FIRST["cpu"])
    why = "as asked" if backend != "auto" else "; ".join(passed_over) or first
    return f"attention by {' and '.join(chosen)} ({why})"


def candidates(backend: str, request: Request) -> tuple[str, ...]:
    """The names to try, in order.

    Args:
        backend: as in `choose_backend`.
        request: what is asked; the order is that of its device.

    Raises:
        UserError: there is no such backend.
    """
    if backend == "auto":
        return ORDER.get(request.device, ORDER["cpu"])
    if backend not in BACKENDS:
        raise UserError("compute.attention", f"{backend!r} is not a backend", f"Use auto or {', '.join(BACKENDS)}")
    return (backend,)
