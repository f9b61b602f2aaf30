"""torch.compile for what gains by it: feed-forward halves and norms. Attention's kernels are fast as they are."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from lightning_llm.models.feed_forward import FeedForward
from lightning_llm.models.transformer import RMSNorm
from lightning_llm.settings import UserError

COMPILED = (FeedForward, RMSNorm)


def compile_parts(model: nn.Module) -> None:
    """Compile each part of a model by itself, at its first call; names of parameters stay as they are.

    All layers share their graphs, and a graph serves any number of tokens: what changes with a batch are the lengths of
    its segments, and only attention and the rotation see those.
    """
    for module in model.modules():
        if isinstance(module, COMPILED):
            module.compile(dynamic=True)


def refuse_absent_compiler(accelerator: str) -> None:
    """Before anything trains.

    Args:
        accelerator: "cpu", whose graphs become C++, or "gpu", whose graphs become Triton's.

    Raises:
        UserError: the compiler is not there.
    """
    if accelerator == "gpu":
        if find_spec("triton") is None:
            raise UserError("compute.compile", "needs triton, not installed here", "Install it, or leave compile off")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "compute.compile", "finds no C++ compiler", "Install g++ or name one in CXX, or leave compile off"
        ) from None
