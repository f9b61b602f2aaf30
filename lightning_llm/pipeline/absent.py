"""What a run asks of this machine and does not find there: told before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from lightning_llm.pipeline.expand import Node
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.pipeline.rounds import typed_key
from lightning_llm.settings import UserError
from lightning_llm.stages.config import GenerateSettings


def refuse_absent_devices(recipe: Recipe, nodes: Sequence[Node]) -> None:
    """Refuse more GPUs than there are, and to compile without a compiler.

    Args:
        nodes: that are to be made.

    Raises:
        UserError: names the compute, or what is missing.
    """
    if recipe.compute.accelerator == "gpu" and any(node.kind != "prepare" for node in nodes):
        import torch

        if torch.cuda.device_count() < recipe.compute.devices:
            raise UserError(
                f"compute={recipe.compute.name}",
                f"wants {recipe.compute.devices} GPUs, torch sees {torch.cuda.device_count()}",
                "Choose compute=cpu, or fewer devices",
            )
    if recipe.compute.compile and any(node.kind == "train" for node in nodes):
        from lightning_llm.models.compilation import refuse_absent_compiler

        refuse_absent_compiler(recipe.compute.accelerator)


def refuse_absent_engines(recipe: Recipe, nodes: Sequence[Node]) -> None:
    """Refuse to sample with vLLM without a GPU, or where it is not installed.

    Args:
        nodes: that are to be made.

    Raises:
        UserError: names the stage's key.
    """
    for node in nodes:
        if not (isinstance(node.settings, GenerateSettings) and node.settings.engine == "vllm"):
            continue
        key = typed_key(f"stages.{node.name}.engine", recipe.rounds)
        if recipe.compute.accelerator != "gpu":
            remedy = f"Choose compute=gpu, or {key}=own"
            raise UserError(key, f"is vllm, which needs a GPU, and compute is {recipe.compute.name}", remedy)
        if find_spec("vllm") is None:
            raise UserError(
                key, "is vllm, which is not installed here", f"pip install 'lightning-llm[vllm]', or {key}=own"
            )
