"""Imports point downwards: what depends on what can be read off one list."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_llm

PACKAGE = Path(lightning_llm.__file__).parent
LAYERS = [  # a file imports from its own layer and from those before it
    {"settings"},
    {"batch", "schedules", "losses", "merging"},
    {"models"},
    {"data"},
    {"generation"},
    {"optimization"},
    {"objectives"},
    {"evaluation"},
    {"training"},
    {"stages"},
    {"pipeline"},
    {"report"},
    {"cli"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
PURE = LAYERS[1]  # mathematics: no training loop in sight
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")  # that one imports lazily


def test_the_layers_are_what_is_there_and_what_the_documents_say():
    """A layer that is named but absent misleads as much as one that is not named."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(LEVEL) == names - {"__init__"}
    root = Path(__file__).parents[1]
    [line] = re.findall(r"Imports point downwards: (.*?)\. ", (root / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    assert [set(layer.strip(" `\n").split()) for layer in line.split("<")] == LAYERS[1:]
    page = (root / "docs" / "architecture.md").read_text("utf-8")
    block = page.partition("(`tests/test_layers.py`):\n\n")[2].partition("\n\n")[0]
    firsts = [
        set(re.match(r" {4}(\w+(?:,? [\w*/.]+)*)", line)[1].replace(",", "").split()) for line in block.split("\n")
    ]
    assert [layer - {"*/config.py"} for layer in firsts] == LAYERS


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, anywhere in it; `from a import b` counts as `a.b`."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def is_config(name: str) -> bool:
    """A config.py, or a name in one: standard library only, so it may be imported from anywhere."""
    return "config" in name.split(".")[2:3]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path):
    own = module_name(path).split(".")[1]
    assert own in LEVEL, (
        f"{own} is in no layer: give it one in {Path(__file__).name}, and in docs/architecture.md and CONTRIBUTING.md"
    )
    for name in imported_modules(path):
        if not name.startswith("lightning_llm.") or is_config(name) or name == "lightning_llm.__version__":
            continue
        other = name.split(".")[1]
        assert LEVEL.get(other, len(LAYERS)) <= LEVEL[own], f"{module_name(path)} imports {name}, which lies above it"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.name == "config.py"], ids=lambda path: path.parent.name
)
def test_settings_need_only_the_standard_library(path):
    for name in imported_modules(path):
        top = name.split(".")[0]
        ours = name.startswith("lightning_llm.settings") or (top == "lightning_llm" and is_config(name))
        assert ours or top in sys.stdlib_module_names, f"{module_name(path)} imports {name}"


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if module_name(path).split(".")[1] in PURE],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_mathematics_knows_no_lightning(path):
    assert not {name for name in imported_modules(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_modelling_code_of_transformers(path):
    assert not {name for name in imported_modules(path) if name.startswith("transformers.models")}
    assert not {name for name in imported_modules(path) if name.startswith("transformers.AutoModel")}


@pytest.mark.parametrize("module", ["lightning_llm", "lightning_llm.cli", "lightning_llm.report"])
def test_the_command_line_starts_without_torch(module):
    heavy = ["torch", "lightning", "transformers", "datasets", "numpy", "plotly"]
    script = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
