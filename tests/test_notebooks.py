"""Every notebook runs from its first cell to its last, in this environment, and what is committed was executed."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks: pip install 'lightning-llm[notebooks]'")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def plans(notebook):
    """The plans that a notebook shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = [output.get("data", {}).get("text/plain", output.get("text", "")) for c in cells for output in c.outputs]
    return [text for text in texts if "total:" in text and "FLOPs" in text]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    from ipykernel.kernelspec import install
    from nbclient import NotebookClient

    install(prefix=str(tmp_path / "kernels"))  # this interpreter's kernel, whatever others the machine has
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "kernels" / "share" / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    notebook = nbformat.read(path, as_version=4)
    shown = plans(notebook)
    assert shown
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, tmp_path / path.name)  # to be read where it fails, and to be committed
    assert plans(notebook) == shown  # what is committed is what this code prints


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_those_of_one_run_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert any("text/html" in output.get("data", {}) for output in outputs)
