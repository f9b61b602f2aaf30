"""The verb store: what is there, who refers to it, how big it is, whether it is whole."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_llm.pipeline.config import StoreSettings
from lightning_llm.pipeline.store import Store, read_record, size_of
from lightning_llm.settings import UserError


def list_store(settings: StoreSettings) -> int:
    """Print a line per artifact: size, when it was made, the runs that link to it."""
    store = Store(settings.store.root)
    referring = store.referring_runs(Path(settings.runs))
    artifacts = store.named(settings.names)
    total = 0
    for path in artifacts:
        size = size_of(path)
        total += size
        record = read_record(path) or {}
        runs = referring.get(path.resolve(), [])
        print(f"{_size(size)}  {record.get('created', 'damaged'):<26} {path.name}  {_shown_runs(runs)}")
    others = sum(size_of(store.root / name) for name in (".making", ".damaged") if (store.root / name).is_dir())
    kept = f"; {_size(others).strip()} half-written or damaged" if others else ""
    print(f"{_size(total)}  {len(artifacts)} artifacts in {_shown(store.root)}{kept}")
    return 0


def verify_store(settings: StoreSettings) -> int:
    """Hash every file again; exit code 1 if one is not as it was written."""
    store = Store(settings.store.root)
    damaged = 0
    for path in store.named(settings.names):
        faults = store.faults(path, deep=True)
        damaged += bool(faults)
        print(
            f"{'damaged' if faults else 'whole':<8} {path.name}{'  ' if faults else ''}{'; '.join(faults)}", flush=True
        )
    return 1 if damaged else 0


def remove_from_store(settings: StoreSettings) -> int:
    """Remove artifacts that no run refers to; with force=true any."""
    if not settings.names:
        raise UserError("store remove", "no artifact is named", "Name folders or keys, as store list shows them")
    store = Store(settings.store.root)
    referring = store.referring_runs(Path(settings.runs))
    chosen = store.named(settings.names)
    for path in chosen:
        if (runs := referring.get(path.resolve())) and not settings.force:
            raise UserError(path.name, f"{_shown(runs[0])} refers to it", "Remove it all the same with force=true")
    for path in chosen:
        size = size_of(path)
        store.remove(path)
        print(f"removed {path.name} ({_size(size).strip()})")
    return 0


def _shown_runs(runs: list[Path]) -> str:
    """The newest run and how many others there are."""
    if not runs:
        return "no run"
    others = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{_shown(max(runs, key=lambda run: run.name))}{others}"


def _size(size: int) -> str:
    return f"{size / 2**30:8.2f} GiB" if size >= 2**30 else f"{size / 2**20:8.2f} MiB"


def _shown(path: Path) -> str:
    shown = os.path.relpath(path)
    return str(path) if shown.startswith("..") else shown
