"""Merging: pure functions that make one state of several. Nothing here reads a file or trains."""

from lightning_llm.merging.averaging import ema, linear, liti, polyak
from lightning_llm.merging.spherical import slerp, slerp_task_vectors
from lightning_llm.merging.task_vectors import dare, task_arithmetic, ties

__all__ = ["dare", "ema", "linear", "liti", "polyak", "slerp", "slerp_task_vectors", "task_arithmetic", "ties"]
