"""Rows of tables: parquet, folders that `datasets` wrote, data sets on the hub. Rows are named by number.

They come out a few at a time. Of parquet a row group is in memory, of Arrow files what the system keeps of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_llm.data.gauge import Tell
from lightning_llm.data.rows import SKIP, first_line
from lightning_llm.settings import UserError

TOGETHER = 256  # rows turned into objects at a time


def read_parquet(path: Path, tell: Tell | None = None) -> Iterator[tuple[str, Any]]:
    """(where, fields or the error that stands for them) of each row.

    Args:
        tell: is told the share of the rows that have been read.

    Raises:
        UserError: the file cannot be read, or not to its end.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=TOGETHER):
                for fields in _objects(batch):
                    number += 1
                    if tell:
                        tell(number / table.metadata.num_rows)
                    yield _named(f"{path}: row {number}", fields)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        after = f" after row {number}" if number else ""
        raise UserError(
            str(path), f"cannot be read as parquet{after} ({first_line(error)})", "Write it again"
        ) from error


def read_datasets_folder(folder: Path, split: str, tell: Tell | None = None) -> Iterator[tuple[str, Any]]:
    """(where, fields or the error that stands for them) of each row of a split that save_to_disk wrote.

    Args:
        tell: is told the share of the rows that have been read.

    Raises:
        UserError: it cannot be read.
    """
    import datasets
    import pyarrow

    number = 0
    try:
        rows = datasets.Dataset.load_from_disk(str(folder)).with_format("arrow")
        for table in rows.iter(TOGETHER):
            for fields in _objects(table):
                number += 1
                if tell:
                    tell(number / len(rows))
                yield _named(f"{folder} {split}: row {number}", fields)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        after = f" after row {number}" if number else ""
        what = f"cannot be read as a folder of datasets{after} ({first_line(error)})"
        raise UserError(str(folder), what, "Save it again") from error


def read_hub(
    name: str, options: dict[str, Any], commit: str | None, where: str, tell: Tell | None = None
) -> Iterator[tuple[str, Any]]:
    """(where, fields) of each row of a data set on the Hugging Face hub, read as it comes over the line.

    Args:
        name: <org>/<name>, or a folder laid out like such a repository.
        options: split, config, revision.
        commit: what the revision stands for, where that is known.
        where: the setting that names the source.
        tell: is told the share of the rows that have been read, where the data set's card says how many there are.

    Raises:
        UserError: it is not there, or there is no connection.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    split = options.get("split", "train")
    number = 0
    try:
        rows = datasets.load_dataset(
            name, options.get("config"), split=split, revision=commit or options.get("revision"), streaming=True
        )
        of_split = (rows.info.splits or {}).get(split)
        total = of_split.num_examples if of_split else None
        for number, fields in enumerate(rows, 1):
            if tell and total:
                tell(min(number / total, 1.0))
            yield f"hub:{name} {split}: row {number}", fields
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        after = f" after row {number}" if number else ""
        raise UserError(
            f"{where}.path",
            f"hub:{name} cannot be read{after} ({first_line(error)})",
            "Check name, config, split and connection, or download the files and give their path",
        ) from error


def commit_on_hub(name: str, revision: str | None) -> str | None:
    """The commit that a data set's revision stands for now; None where nobody can be asked."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=10.0).sha
    except Exception:  # each transport has errors of its own, and a commit is good to know and no more
        return None


def _objects(table: Any) -> list[Any]:
    """The rows of an Arrow table, and an error in place of one that cannot be an object (text that is not UTF-8)."""
    try:
        return table.to_pylist()
    except ValueError as error:
        if table.num_rows == 1:
            return [error]
        return [row for number in range(table.num_rows) for row in _objects(table.slice(number, 1))]


def _named(where: str, fields: Any) -> tuple[str, Any]:
    if isinstance(fields, Exception):
        return where, UserError(where, f"cannot be read ({first_line(fields)})", f"Mend it, {SKIP}")
    return where, fields
