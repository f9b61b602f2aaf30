"""Run a plan: what is in the store is taken from there, what is missing is made, stage by stage.

runs/<recipe>/<time>-<id>/
    run.json plan.json plan.txt recipe.json
    artifacts/<node> -> the artifact in the store
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_llm import __version__
from lightning_llm.pipeline.absent import refuse_absent_devices, refuse_absent_engines
from lightning_llm.pipeline.examples import planned_rows
from lightning_llm.pipeline.expand import Node
from lightning_llm.pipeline.kernels import attention_lines, made_models
from lightning_llm.pipeline.key import canonical, node_keys, outside_key
from lightning_llm.pipeline.lacking import refuse_lacking
from lightning_llm.pipeline.plan import Plan, duration, plan
from lightning_llm.pipeline.prepared import Prepared
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.pipeline.rounds import typed_key
from lightning_llm.pipeline.store import Claim, Store, read_record
from lightning_llm.settings import UserError
from lightning_llm.stages.context import StageContext, StageResult, model_directory
from lightning_llm.stages.gate import GateClosed, obey
from lightning_llm.training.config import LoggedRun
from lightning_llm.training.console import Console, StageConsole
from lightning_llm.training.loggers import refuse_absent

LIBRARIES = ("torch", "lightning", "tokenizers", "transformers", "datasets", "safetensors", "numpy", "flash-attn")
# verbs that go on from what an interrupted run has left; training does if it samples
CONTINUED = ("generate", "judge", "score")
SHOWN = {  # metric -> how the console calls it when a stage is done
    "loss": "loss",
    "validation/loss": "validation loss",
    "rewards/accuracies": "pairs won",
    "validation/reward/mean": "held-out reward",
    "tasks/exact_match": "tasks",
    "preference/accuracy": "preference",
    "preference/calibration_error": "calibration error",
    "judge/win_rate": "win rate",
    "rows": "rows",
    "parameters/share": "share of parameters",
    "gate/short_context": "rise of perplexity",
    "gate/needle": "needles found",
    "vocab_size": "entries",
}


class StageFailed(RuntimeError):
    """A stage ended in an error that is not the user's. The error itself is the cause."""

    def __init__(self, stage: str, kept: Sequence[str]):
        self.stage, self.kept = stage, tuple(kept)
        super().__init__(stage, self.kept)

    def __str__(self) -> str:
        kept = ", ".join(self.kept) or "nothing"
        return f"stage {self.stage} failed. Kept: {kept}; the same command continues from there"


@dataclass(repr=False)
class RunRecord:
    """What a run has made: `folder` on disk, and of every node its artifact, key and metrics (run.json)."""

    folder: Path
    plan: Plan
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: str = "running"  # running | done | stopped (by a gate) | failed | interrupted
    seconds: float = 0.0

    def artifact(self, node: str) -> Path:
        """The folder of a node's artifact in the store."""
        return Path(self.stages[node]["artifact"])

    def __repr__(self) -> str:
        made = sum(not stage["reused"] for stage in self.stages.values())
        return f"{self.folder}: {self.status}, {made} of {len(self.plan.nodes)} nodes made, {duration(self.seconds)}"

    def write(self) -> None:
        """Bring run.json up to date, in one piece."""
        recipe = self.plan.recipe
        content = {
            "recipe": recipe.name,
            "scale": recipe.scale.name,
            "seed": recipe.seed,
            "status": self.status,
            "created": self.folder.name.rpartition("-")[0],
            "seconds": round(self.seconds, 1),
            "version": __version__,
            "overrides": list(recipe.overrides),
            "stages": self.stages,
        }
        write_json(self.folder / "run.json", content)


def run(recipe: Recipe, *, until: str | None = None, only: str | None = None, force: Sequence[str] = ()) -> RunRecord:
    """Make what is missing of a recipe, and a run folder that links to all of it.

    Args:
        until: the last stage; what neither it nor a stage before it needs is left out.
        only: the one stage; what it starts from has to be in the store.
        force: stages that are made again although they are there.

    Raises:
        UserError: the recipe, a selector or the data is wrong, or it would take longer than `limits.hours`.
        GateClosed: a gate does not let it pass; what it has found is in the run's folder, which the error names.
        StageFailed: a stage ended in an error; what was made before it is kept.
        KeyboardInterrupt: SIGINT or SIGTERM; the same.
    """
    checked = check_run(recipe, until=until, only=only, force=force)
    whole, chosen, keys = checked.whole, checked.chosen, checked.keys
    recipe, store = whole.recipe, Store(whole.recipe.store.root)
    _refuse_missing(checked, store)
    store.make()
    record = RunRecord(_new_folder(Path(recipe.runs).expanduser() / recipe.name), chosen)
    store.register(record.folder)
    began = time.monotonic()
    try:
        with _interruptible():
            _write_plan(record)
            console = Console(len(chosen.nodes))
            for line in checked.attention:
                console.note(line)
            is_prepared = False
            for index, node in enumerate(chosen.nodes, start=1):
                if node.kind != "prepare" and not is_prepared:
                    is_prepared = True
                    _refuse_unfit(record, checked)
                _run_node(
                    record, store, node, keys, whole, console.stage(index, node.name, node.kind), node.stage in force
                )
                record.seconds = time.monotonic() - began
                record.write()
                if node.kind == "prepare":
                    _refuse_lacking(record, node, checked.to_make)
        record.status = "done"
    except GateClosed as closed:
        record.status, closed.folder = "stopped", record.folder
        raise
    except BaseException as error:
        record.status = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        raise
    finally:
        record.seconds = time.monotonic() - began
        record.write()
    return record


@dataclass(frozen=True)
class CheckedRun:
    """A run that nothing speaks against, as far as can be told before the first stage."""

    whole: Plan
    chosen: Plan
    keys: dict[str, str]
    there: dict[str, Path | None]  # node -> its artifact
    to_make: list[Node]
    attention: list[str]  # what its models compute with, a line each


def check_run(
    recipe: Recipe, *, until: str | None = None, only: str | None = None, force: Sequence[str] = ()
) -> CheckedRun:
    """All that `run` refuses but for a missing input of `only`, which an earlier job of a sweep may make.

    Raises:
        UserError: see `run`.
    """
    whole = plan(recipe)
    for name in force:
        whole.checked_stage("force", name)
    chosen = whole.selected(until=until, only=only)
    keys = node_keys(whole.nodes)
    store = Store(whole.recipe.store.root)
    there = {n.name: store.find(n.kind, n.name, keys[n.name]) for n in whole.nodes}
    to_make = [node for node in chosen.nodes if there[node.name] is None or node.stage in force]
    _refuse_folder("store.root", store.root)
    _refuse_folder("runs", Path(whole.recipe.runs).expanduser().absolute())
    _refuse_long(whole.recipe, to_make)
    refuse_absent(whole.recipe.logger.values())
    refuse_absent_devices(whole.recipe, to_make)
    refuse_absent_engines(whole.recipe, to_make)
    _refuse_damaged(whole, to_make)
    attention = attention_lines(whole.recipe.compute, to_make, made_models(whole.nodes))
    return CheckedRun(whole, chosen, keys, there, to_make, attention)


def _refuse_missing(checked: CheckedRun, store: Store) -> None:
    chosen, others = {node.name for node in checked.chosen.nodes}, {node.name: node for node in checked.whole.nodes}
    for node in checked.chosen.nodes:
        for source in node.inputs.values():
            if source in others and source not in chosen and checked.there[source] is None:
                path = store.place(others[source].kind, source, checked.keys[source])
                what = f"{source} is {'damaged' if path.is_dir() else 'not'} in the store"
                raise UserError(f"only={node.stage}", what, f"Make it first: until={others[source].stage}")


def _refuse_folder(key: str, folder: Path) -> None:
    """Before anything is made, not after: a folder that nothing can be put in."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = f"{folder} cannot be a folder" if not there.is_dir() else f"{there} may not be written to"
        raise UserError(key, what, "Name a folder of your own")


def _refuse_long(recipe: Recipe, nodes: Sequence[Node]) -> None:
    seconds = sum(node.figures["seconds"] for node in nodes)
    if seconds > 3600 * recipe.limits.hours:
        raise UserError(
            "limits.hours",
            f"about {duration(seconds)} on {recipe.compute.devices} x {recipe.compute.name} are more than "
            f"{recipe.limits.hours:g} hours",
            f"Choose a smaller scale or another compute, or allow it: limits.hours={math.ceil(seconds / 3600)}",
        )


def _refuse_damaged(whole: Plan, nodes: Sequence[Node]) -> None:
    """Files of models of elsewhere that are cut short, or are not those of their config.json."""
    own = {node.name for node in whole.nodes}
    outside = {source: None for node in nodes for source in node.inputs.values() if source not in own}
    if outside:
        from lightning_llm.models import Transformer
        from lightning_llm.models.families import CLASSIFIER, read_head
        from lightning_llm.models.reward import RewardModel

        for source in outside:
            directory = model_directory(Path(source))
            kind = RewardModel if read_head(directory) == CLASSIFIER else Transformer
            kind.check_pretrained(directory)


def _refuse_unfit(record: RunRecord, checked: CheckedRun) -> None:
    """What the data say against stages that are to be made, before the first of them is."""
    artifacts = {name: Path(stage["artifact"]) for name, stage in record.stages.items()}
    prepared = Prepared(checked.whole.recipe, {node.name: node for node in checked.whole.nodes}, artifacts)
    for node in checked.to_make:
        try:
            prepared.refuse(node)
        except UserError as error:
            raise _in_the_recipe(error, node, checked.whole.recipe) from error


def _refuse_lacking(record: RunRecord, node: Node, to_make: Sequence[Node]) -> None:
    """What the rows lack that a node has prepared, under the keys that the user has typed."""
    try:
        refuse_lacking(node, record.artifact(node.name), record.plan.nodes, to_make)
    except UserError as error:
        raise UserError(*(typed_key(part, record.plan.recipe.rounds) for part in error.args)) from error


# ---- one node ----


def _run_node(
    record: RunRecord, store: Store, node: Node, keys: dict[str, str], whole: Plan, console: StageConsole, again: bool
) -> None:
    key = keys[node.name]
    with (
        console,
        store.claim(
            node.kind,
            node.name,
            key,
            again=again,
            keeps=goes_on(node),
            waiting=lambda: console.note("another run is making it: waiting"),
        ) as claim,
    ):
        for fault in claim.lost:
            console.note(f"the artifact that was there cannot be used ({fault}): it is set aside and made again")
        if claim.found is not None and not again:
            artifact, reused = claim.found, True
        else:
            artifact, reused = _make(record, store, node, keys, whole, console, claim), False
    content = read_record(artifact) or {}
    metrics = content.get("metrics", {})
    record.stages[node.name] = {"artifact": str(artifact), "key": key, "reused": reused, "metrics": metrics}
    if node.kind == "evaluate":  # what a stage has learnt stands with the stage
        record.stages.get(node.stage, {}).setdefault("metrics", {}).update(metrics)
    link = record.folder / "artifacts" / node.name
    link.symlink_to(os.path.relpath(artifact, link.parent.resolve()))
    console.close("reused" if reused else summary(metrics))
    if node.kind == "gate":
        try:
            obey(node.name, artifact)
        except GateClosed as closed:
            raise _in_the_recipe(closed, node, whole.recipe) from closed


def goes_on(node: Node) -> bool:
    """Whether a node that was killed goes on from what it has left, and ends as if nothing had happened."""
    return node.kind in CONTINUED or (node.kind == "train" and node.settings.rollout is not None)


def _make(
    record: RunRecord, store: Store, node: Node, keys: dict[str, str], whole: Plan, console: StageConsole, claim: Claim
) -> Path:
    """Run a node's verb on its inputs, and make what it leaves an artifact."""
    kinds = {other.name: other.kind for other in whole.nodes}
    inputs = {
        role: store.place(kinds[source], source, keys[source]) if source in keys else Path(source)
        for role, source in node.inputs.items()
    }
    recipe = whole.recipe
    logged = LoggedRun(recipe.name, record.folder.name, list(recipe.logger.values())) if recipe.logger else None
    rows = planned_rows(recipe.stages.get(node.name))
    context = StageContext(
        node.name,
        node.settings,
        inputs,
        claim.folder,
        recipe.compute,
        console,
        node.evaluate_every,
        logged,
        rows,
        node.inputs,
    )
    began = time.monotonic()
    try:
        with store.reading(keys[source] for source in node.inputs.values() if source in keys):
            _refuse_removed(node, inputs)
            result: StageResult = importlib.import_module(f"lightning_llm.stages.{node.kind}").run(context)
    except KeyboardInterrupt:
        raise
    except UserError as error:
        raise _in_the_recipe(error, node, whole.recipe) from error
    except Exception as error:
        raise StageFailed(node.name, list(record.stages)) from error
    seconds = time.monotonic() - began
    return claim.commit(
        {
            "name": node.name,
            "kind": node.kind,
            "key": keys[node.name],
            "settings": canonical(node.settings),
            "inputs": {
                role: {"key": keys[source], "path": str(inputs[role])}
                if source in keys
                else {"sha256": outside_key(source), "path": source}
                for role, source in node.inputs.items()
            },
            "code_version": __version__,
            "libraries": _libraries(),
            "git": _git_state(),
            "seed": getattr(node.settings, "seed", None),
            **_machine(whole.recipe),
            "ledger": result.ledger,
            "metrics": _finite(result.metrics),
            "flops": result.flops,
            "seconds": {name: round(s, 3) for name, s in ({"total": seconds} | result.seconds).items()},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def _refuse_removed(node: Node, inputs: dict[str, Path]) -> None:
    """Another process may have removed, by force, what this run found or made some stages ago."""
    for role, path in inputs.items():
        if not path.is_dir():
            raise UserError(
                f"stage {node.name}", f"its input {role}, {path}, has been removed", "The same command makes it again"
            )


def _in_the_recipe(error: UserError, node: Node, recipe: Recipe) -> UserError:
    """A stage speaks of its own settings; what is typed begins with the stage. The tokenizer is all stages'."""
    if node.stage not in recipe.stages:
        return error
    known = [f.name for f in fields(recipe.stages[node.stage])]
    own = rf"(?<![\w./])(?!model\.tokenizer)(?=({'|'.join(known)})\.[a-z])"
    where, *rest = map(str, error.args)
    whole = f"stages.{node.stage}.{where}" if where in known else where
    parts = (re.sub(own, f"stages.{node.stage}.", part) for part in (whole, *rest))
    return type(error)(*(typed_key(part, recipe.rounds) for part in parts))


def summary(metrics: dict[str, Any]) -> str:
    """The few metrics that say how a stage went."""
    shown = [f"{name} {metrics[key]:.4g}" for key, name in SHOWN.items() if metrics.get(key) is not None]
    if (size := metrics.get("bytes_per_token")) is not None:  # of what a frozen model says of tokens
        tokens, speed = metrics["tokens"], metrics["tokens_per_second"]
        shown.append(f"{tokens:,} tokens  {tokens * size / 2**20:.1f} MiB  {speed:,.0f} tokens/s")
    return "  ".join(shown)


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _machine(recipe: Recipe) -> dict[str, Any]:
    torch = sys.modules.get("torch")  # preparing data needs none, and shall not wait for it
    device = recipe.compute.accelerator
    if torch is not None and device == "gpu" and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "device": device,
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if torch is not None else None,
        "threads": recipe.compute.threads or (torch.get_num_threads() if torch is not None else os.cpu_count()),
    }


@functools.cache
def _libraries() -> dict[str, str]:
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


@functools.cache
def _git_state() -> dict[str, Any] | None:
    """The commit of the code, if it runs from a checkout."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- the run folder ----


def _new_folder(parent: Path) -> Path:
    """`<time>-<id>`; two runs that start in the same second get one each."""
    folder = parent / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    (folder / "artifacts").mkdir(parents=True)
    return folder


def _write_plan(record: RunRecord) -> None:
    write_json(record.folder / "plan.json", record.plan.to_json())
    (record.folder / "plan.txt").write_text(f"{record.plan}\n", "utf-8")
    recipe = dataclasses.asdict(record.plan.recipe)
    write_json(record.folder / "recipe.json", recipe | {"pinned": sorted(record.plan.recipe.pinned)})
    record.write()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
