"""A recipe from YAML to artifacts: compose -> scaled -> expand -> plan -> run. No file here imports torch."""

from lightning_llm.pipeline.plan import Plan, plan
from lightning_llm.pipeline.recipe import Recipe, compose
from lightning_llm.pipeline.runner import RunRecord, StageFailed, run

__all__ = ["Plan", "Recipe", "RunRecord", "StageFailed", "compose", "plan", "run"]
