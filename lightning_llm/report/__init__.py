"""The page: one self-contained HTML file (and Markdown) about one run or several, made from run folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["report"]


def report(run_folders: Sequence[Path | str], output: Path | str) -> Path:
    """Write the page to `output` and the same facts as Markdown beside it (`report.html`, `report.md`).

    Nothing but the folders is read, so a page can be made on any machine they are copied to. What a run lacks, because
    it failed or was cut, is named on the page.

    Returns:
        The page's path.

    Raises:
        UserError: no folder is given, or one holds no run.
    """
    from lightning_llm.report.comparison import labelled
    from lightning_llm.report.markdown import write_markdown
    from lightning_llm.report.page import write_page
    from lightning_llm.report.record import read_runs

    runs = labelled(read_runs([Path(folder) for folder in run_folders]))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_page(runs, output)
    write_markdown(runs, output.with_suffix(".md"))
    return output
