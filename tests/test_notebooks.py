"""Every notebook runs from its first cell to its last, in this environment, and what is committed was executed."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks: pip install 'lightning-llm[notebooks]'")
LESS_TEXT = [
    "+tokenizer.sources={web: {path: 'embedded:web'}}",
    *(f"scale.corpora.{n}.path=null" for n in ("docs", "math")),
]
SMALLER = ["scale.vocabulary=512", "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2"]
SHORTER = {  # what a test of a notebook trains and reads less
    "01_inspect_a_run": {
        "pretraining_tokens=200_000": "pretraining_tokens=40_000",
        "every=20_000": "every=10_000",
        '"compute.threads=1"': str(["compute.threads=1", "model.num_key_value_heads=1", *SMALLER, *LESS_TEXT])[1:-1],
    },
    "02_preference_learning": {
        '"compute.threads=1"': str(["compute.threads=1", *LESS_TEXT])[1:-1],
        "{rows: 6000, held_out: 300}": "{rows: 1200, held_out: 200}",
        "rows=18_000": "rows=6_000",
        "sft.examples=9000": "sft.examples=2000",
        "reward_model.examples=6000": "reward_model.examples=1000",
        "online_dpo.examples=1280": "online_dpo.examples=320",
    },
    "03_distillation_and_merging": {
        "500_000": "60_000",
        "STUDENTS, 200_000": "STUDENTS, 40_000",
        '"decayed"), 80_000': '"decayed"), 20_000',
        "0.125 * i, 3) for i in range(13)": "0.5 * i, 3) for i in range(4)",
        "0.15 * i, 3) for i in range(10)": "0.4 * i, 3) for i in range(4)",
    },
}
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def codes(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def plans(cell):
    """The plans that a cell shows."""
    texts = [output.get("data", {}).get("text/plain", output.get("text", "")) for output in cell.outputs]
    return [text for text in texts if "total:" in text and "FLOPs" in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_what_this_code_plans(path):
    cells = codes(nbformat.read(path, as_version=4))
    [at] = [number for number, cell in enumerate(cells) if plans(cell)]
    names = {}
    for cell in cells[: at + 1]:
        exec(cell.source, names)
    assert plans(cells[at]) == [repr(eval(cells[at].source.splitlines()[-1], names))]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    from ipykernel.kernelspec import install
    from nbclient import NotebookClient

    install(prefix=str(tmp_path / "kernels"))  # this interpreter's kernel, whatever others the machine has
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "kernels" / "share" / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    notebook = nbformat.read(path, as_version=4)
    for long, short in SHORTER[path.stem].items():
        cells = [cell for cell in codes(notebook) if long in cell.source]
        assert cells, long
        for cell in cells:
            cell.source = cell.source.replace(long, short)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, tmp_path / path.name)  # to be read where it fails


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_those_of_one_run_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in codes(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in codes(notebook) for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert any("text/html" in output.get("data", {}) for output in outputs)
