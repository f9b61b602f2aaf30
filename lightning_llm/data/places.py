"""What the `path` of a source leads to. Standard library only: `plan` asks it before anything is read.

embedded   embedded:<name>
stage      stage:<name>, the rows that another stage of the recipe makes
hub        hub:<org>/<name>, or hub:<folder> laid out like a data set's repository
tokens     a folder of tokens that `prepare` made, of this run or another
datasets   a folder that `datasets` wrote with save_to_disk
files      a file, a glob pattern, or a folder of files
"""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

from lightning_llm.data.config import STAGE
from lightning_llm.data.embedded import CONTENTS, options_of
from lightning_llm.settings import UserError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
CODECS = {".gz": "gzip", ".zst": "zstd"}  # may follow a suffix of jsonl and text; parquet compresses itself
SPLITS = ("train", "validation")  # of prepared tokens


def split_path(path: str | None, where: str) -> tuple[str, str]:
    """The kind of place that a path leads to, and what identifies it there.

    Raises:
        UserError: it names nothing, or an embedded source that is none.
    """
    if not path:
        raise UserError(f"{where}.path", "names nothing", "Give a file, a pattern, hub:<org>/<name> or embedded:<name>")
    kind, colon, rest = path.partition(":")
    if colon and kind == "embedded" and rest not in CONTENTS:
        raise UserError(f"{where}.path", f"there is no {path}", f"Embedded are {', '.join(CONTENTS)}")
    if colon and (kind in ("embedded", "hub") or path.startswith(STAGE)):
        return kind, rest
    folder = Path(path).expanduser()
    if is_datasets_folder(folder):
        return "datasets", path
    return ("tokens" if prepared_facts(folder) else "files"), path


def is_of_stage(path: str | None) -> bool:
    """Whether a path leads to rows that a stage makes: they are no files yet, and have no fingerprint but its key."""
    return bool(path) and path.startswith(STAGE)


def lies_here(path: str) -> bool:
    """Whether a path leads to files on this machine: their content has a fingerprint, their place decides nothing."""
    kind, rest = split_path(path, "path")
    return kind in ("files", "datasets", "tokens") or (kind == "hub" and Path(rest).is_dir())


def missing_place(path: str | None) -> bool:
    """Whether a path should lead to files on this machine, and there are none."""
    if not path:
        return False
    kind, rest = split_path(path, "path")
    return (
        kind == "files"
        and not Path(rest).expanduser().exists()
        and not glob.glob(str(Path(rest).expanduser()), recursive=True)
    )


def source_options(path: str, where: str) -> tuple[str, ...]:
    """Names that `options` may hold for a path."""
    kind, rest = split_path(path, where)
    if kind == "embedded":
        return options_of(rest)
    if kind == "files" and not Path(rest).expanduser().exists() and not glob.has_magic(rest):
        return ("documents", "split")  # that it is not there is said when it is looked for
    return {"hub": ("split", "config", "revision"), "datasets": ("split",), "files": ("documents",)}.get(kind, ())


# ---- files ----


def file_kind(path: Path) -> tuple[str, str] | None:
    """("jsonl", "zstd") of `rows.jsonl.zst`, ("text", "") of `notes.md`; None of what cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    codec = CODECS.get(suffixes[-1], "") if suffixes else ""
    suffixes = suffixes[:-1] if codec else suffixes
    kind = SUFFIXES.get(suffixes[-1]) if suffixes else None
    return None if kind is None or (codec and kind == "parquet") else (kind, codec)


def source_files(pattern: str, where: str) -> list[Path]:
    """The files of a path or glob pattern, sorted; of a folder all that can be read.

    Hidden files and folders stay out, and so does a README beside rows: it tells about them.

    Raises:
        UserError: there are none, or one is of a kind that cannot be read.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = _files_of_folder(path)
        if not files:
            raise UserError(f"{where}.path", f"{pattern} holds no file that can be read", _known())
        return files
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"{where}.path", f"there is no file {pattern}", "Name existing files")
    for file in files:
        if file_kind(file) is None:
            raise UserError(str(file), "is of an unknown kind", _known())
    return files


def _files_of_folder(folder: Path) -> list[Path]:
    kinds = {file: kind[0] for file in visible_files(folder) if (kind := file_kind(file))}
    has_rows = any(kind != "text" for kind in kinds.values())
    return [file for file in kinds if not (has_rows and file.name.lower() == "readme.md")]


def visible_files(folder: Path) -> list[Path]:
    """All files of a folder and those inside it, sorted, but for what a dot hides."""
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _known() -> str:
    codecs = " or ".join(CODECS)
    return f"Give files ending in {', '.join(SUFFIXES)} (and {codecs} behind all but .parquet); convert others, as CSV"


# ---- folders of `datasets` ----


def is_datasets_folder(folder: Path) -> bool:
    """Whether `datasets` wrote the folder with save_to_disk."""
    return "splits" in _facts(folder / "dataset_dict.json") or "_data_files" in _facts(folder / "state.json")


def _facts(path: Path) -> dict[str, Any]:
    """What a file of JSON says; nothing, where it is not there or is no object, as another program's may be."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def datasets_folder(path: str, split: str | None, where: str) -> tuple[Path, str]:
    """The folder of one split and the split's name.

    Args:
        split: which; none: `train`, or the only one that there is.

    Raises:
        UserError: it is not there.
    """
    folder = Path(path).expanduser()
    if splits := _facts(folder / "dataset_dict.json").get("splits"):
        chosen = split or (splits[0] if len(splits) == 1 else "train")
        found = folder / chosen if chosen in splits else None
    else:
        own = _facts(folder / "state.json").get("_split")
        if own is None and split is not None:
            fact = f"is {split}, and {path} was saved without splits"
            raise UserError(f"{where}.options.split", fact, "Leave it out: all rows are read")
        splits, chosen = [own or "train"], split or own or "train"
        found = folder if own in (None, chosen) else None
    if found is None or not (found / "state.json").is_file():
        raise UserError(f"{where}.options.split", f"there is no split {chosen} in {path}", f"Take {', '.join(splits)}")
    for file in datasets_files(found):
        if not file.is_file():
            raise UserError(str(file), f"is named in {found / 'state.json'} and not there", "Save the data set again")
    return found, chosen


def datasets_files(folder: Path) -> list[Path]:
    """The Arrow files of a split, in order.

    Args:
        folder: of the split, with the state.json that names them.

    Raises:
        UserError: it names none.
    """
    path = folder / "state.json"
    try:
        return [folder / Path(entry["filename"]).name for entry in _facts(path)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(str(path), "names no files of data", "Save the data set again") from error


# ---- prepared tokens ----


def prepared_facts(folder: Path) -> Path | None:
    """The `prepare.json` about a folder of prepared tokens, which is an artifact of `prepare` or one source in it."""
    if (folder / "prepare.json").is_file() and (folder / "sources").is_dir():
        return folder / "prepare.json"
    if not any((folder / split / "store.json").is_file() for split in SPLITS):
        return None
    above = (parent / "prepare.json" for parent in folder.absolute().parents[:3])  # a source's name may hold one slash
    return next((path for path in above if path.is_file()), None)


def is_prepared(path: str | None) -> bool:
    """Whether a path leads to tokens and not to rows."""
    is_elsewhere = bool(path) and path.startswith(("embedded:", "hub:", STAGE))
    return bool(path) and not is_elsewhere and prepared_facts(Path(path).expanduser()) is not None


def prepared_source(path: str, where: str) -> tuple[Path, str]:
    """The folder `sources/<name>` of prepared tokens, and the name that the source has there.

    Raises:
        UserError: it is an artifact of several sources.
    """
    folder = Path(path).expanduser().absolute()
    facts = prepared_facts(folder)
    assert facts is not None, "split_path says that it is one"
    inside = folder.relative_to(facts.parent)
    if inside.parts:
        return folder, inside.relative_to("sources").as_posix()
    names = list(json.loads(facts.read_text("utf-8"))["sources"])
    if len(names) != 1:
        listed = ", ".join(f"sources/{name}" for name in names)
        raise UserError(f"{where}.path", f"{path} holds {len(names)} sources", f"Name one of them: {listed}")
    return facts.parent / "sources" / names[0], names[0]


def store_files(folder: Path) -> list[Path]:
    """The files of all splits of a prepared source."""
    return [file for split in SPLITS for file in sorted((folder / split).glob("*")) if file.is_file()]
