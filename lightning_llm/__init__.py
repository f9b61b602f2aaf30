"""Published LLM training recipes as programs: compose one, see its plan, run it."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "compose", "plan", "run"]

if TYPE_CHECKING:
    from lightning_llm.pipeline import compose, plan, run


def __getattr__(name: str):
    # Imported on first use: the command line answers --help without paying for torch and Lightning.
    if name in ("compose", "plan", "run"):
        from lightning_llm import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'lightning_llm' has no attribute {name!r}")
