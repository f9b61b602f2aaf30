"""A finished model by what the user calls it: a folder, or an artifact's name or key in the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning_llm.pipeline.names import name_nearest
from lightning_llm.pipeline.store import Store
from lightning_llm.settings import UserError
from lightning_llm.stages.context import model_directory


def find_model(name: str, store: Store, note: Callable[[str], None] = lambda text: None) -> Path:
    """The Hugging Face directory of a model.

    Args:
        name: an artifact's folder, a Hugging Face directory; or in the store a folder's name, the beginning of a key,
            `<kind>-<stage>` or `<stage>`. Of several artifacts of one stage it is the one that a run took last.
        note: told which one that is, and how the others are called.

    Raises:
        UserError: it is none, or may be of several stages, or an artifact that is damaged.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if stages := sorted(entry.name for entry in path.glob("artifacts/*") if (entry / "model").is_dir()):
            known = ", ".join(f"{name.rstrip('/')}/artifacts/{stage}" for stage in stages)
            raise UserError("model", f"{name} is a run", f"Give one of its models: {known}")
        return model_directory(path)
    models = [artifact for artifact in store.artifacts() if (artifact / "model" / "config.json").is_file()]
    found = [artifact for artifact in models if name in names_of(artifact)]
    found = found or [artifact for artifact in models if artifact.name.rpartition("-")[2].startswith(name)]
    if not found:
        known = sorted({artifact.name.rpartition("-")[0] for artifact in models})
        raise UserError(
            "model", f"there is no folder {name}, and no model of that name in {store.root}", name_nearest(name, known)
        )
    if len({names_of(artifact)[1] for artifact in found}) > 1:
        raise UserError("model", f"{name} may be any of {_listed(found)}", "Give one of these names")
    if len(found) > 1:
        *others, newest = sorted(found, key=store.last_taken)
        note(f"model {name} is {newest.name}, which a run took last; there is also {_listed(others)}")
        found = [newest]
    if faults := store.faults(found[0]):
        raise UserError("model", f"{found[0].name} is damaged: {faults[0]}", "Make it again, or see store verify")
    return model_directory(found[0])


def names_of(artifact: Path) -> tuple[str, str, str]:
    """`<kind>-<stage>-<key>`, `<kind>-<stage>`, `<stage>`."""
    kind_and_stage = artifact.name.rpartition("-")[0]
    return artifact.name, kind_and_stage, kind_and_stage.partition("-")[2]


def _listed(artifacts: list[Path]) -> str:
    return ", ".join(artifact.name for artifact in artifacts)
