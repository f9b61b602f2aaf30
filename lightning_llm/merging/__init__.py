"""Merging: pure functions that make one state of several. Nothing here reads a file or trains."""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["dare", "ema", "linear", "liti", "slerp", "slerp_task_vectors", "task_arithmetic", "ties"]

FILES = {
    "averaging": ("ema", "linear", "liti"),
    "spherical": ("slerp", "slerp_task_vectors"),
    "task_vectors": ("dare", "task_arithmetic", "ties"),
}

if TYPE_CHECKING:
    from lightning_llm.merging.averaging import ema, linear, liti
    from lightning_llm.merging.spherical import slerp, slerp_task_vectors
    from lightning_llm.merging.task_vectors import dare, task_arithmetic, ties


def __getattr__(name: str):
    # Imported on first use: a plan reads the settings beside these files and must not pay for torch.
    for file, names in FILES.items():
        if name in names:
            return getattr(import_module(f"lightning_llm.merging.{file}"), name)
    raise AttributeError(f"module 'lightning_llm.merging' has no attribute {name!r}")
