"""What a stage is handed and what it hands back: the contract between the runner and every file of this folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_llm.settings import UserError
from lightning_llm.stages.config import ComputeConfig
from lightning_llm.training.config import LoggedRun

if TYPE_CHECKING:  # keeps this file free of torch and rich: the runner imports it before anything runs
    from lightning_llm.training.console import StageConsole

LAST = "last"  # folder of a trained artifact whose model is an average: the weights of the last step


@dataclass
class StageContext:
    """One stage on one machine: `run(context) -> StageResult` is all that a file of this folder offers."""

    name: str  # in the recipe
    settings: Any  # one of stages/config.py; everything in it is part of the stage's key
    inputs: dict[str, Path]  # role -> artifact; a model may also be a Hugging Face directory
    # An existing folder to fill; the store renames it when the stage is done. It is empty, but for stages that go on
    # from what an interrupted run has left (`goes_on` in pipeline/runner.py).
    output: Path
    compute: ComputeConfig
    console: StageConsole
    evaluate_every: float | None = None  # tokens between validation losses; none: a tenth of the stage
    logged: LoggedRun | None = None  # where figures of training go besides metrics.jsonl
    rows: float | None = None  # that the tokens of the stage were planned to be, where they were planned as rows
    names: Mapping[str, str] = field(default_factory=dict)  # role -> what the recipe calls that input


@dataclass
class StageResult:
    """What goes into stage.json besides the files."""

    metrics: dict[str, float] = field(default_factory=dict)
    ledger: dict[str, int] = field(default_factory=dict)  # source -> tokens consumed
    flops: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # phase of the stage -> wall time


def model_directory(path: Path) -> Path:
    """The Hugging Face directory of a model: `<artifact>/model`, or the folder itself."""
    path = Path(path)
    for directory in (path / "model", path):
        if (directory / "config.json").is_file():
            return directory
    raise UserError(
        str(path),
        "holds no model (no config.json, no model/config.json)",
        "Name an artifact of a training stage or a Hugging Face directory",
    )


def refuse_other_tokenizer(where: str, inputs: Mapping[str, Path]) -> None:
    """A stage's data and models must have one tokenizer, that of the stage if it was given any; a model without one is
    trusted.

    Raises:
        UserError: one has another; names it.
    """
    from lightning_llm.data.tokenizer import Tokenizer

    own = (inputs["data"] / "tokenizer_fingerprint").read_text("utf-8").strip()
    others = {}
    if "tokenizer" in inputs:
        others["the stage"] = Tokenizer.load(inputs["tokenizer"] / "tokenizer").fingerprint
    for role in (role for role in inputs if role.partition(".")[0] in ("model", "starts_from", "teacher_model")):
        directory = model_directory(inputs[role])
        if (directory / "tokenizer.json").is_file():
            others[f"the model in {directory}"] = Tokenizer.load(directory).fingerprint
    for name, fingerprint in others.items():
        if fingerprint != own:
            raise UserError(
                where,
                f"the tokenizer of the data (sha {own[:8]}) is not that of {name} (sha {fingerprint[:8]})",
                "Give all stages the same model.tokenizer",
            )


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads inside; none: as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
