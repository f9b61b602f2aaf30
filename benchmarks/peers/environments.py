"""An environment for each peer, as peers/<name>.txt asks: LitGPT and transformers 5 do not install together.

    python benchmarks/peers/environments.py [names ...]

They live in build/peers/<name>. One that is there already and whose requirements have not changed is left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ENVIRONMENTS = FOLDER.parent.parent / "build" / "peers"
NAMES = sorted(path.stem for path in FOLDER.glob("*.txt"))


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, which need not be there."""
    return ENVIRONMENTS / name / "bin" / "python"


def lacks(name: str) -> str | None:
    """What is missing before a peer can be measured, for a reader; None: nothing."""
    return None if python_of(name).exists() else f"the environment of {name} is not there: make bench-peers"


def install(name: str) -> None:
    """Make the environment, unless it was made from the same requirements; one that fails half-way is made again."""
    requirements = FOLDER / f"{name}.txt"
    made_from = ENVIRONMENTS / name / "made_from.txt"
    if made_from.exists() and made_from.read_text() == requirements.read_text():
        return
    venv.create(ENVIRONMENTS / name, with_pip=True, clear=True)
    subprocess.run([python_of(name), "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
    made_from.write_text(requirements.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(NAMES))
    names = parser.parse_args().names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))} is no peer; there are {', '.join(NAMES)}")
    for name in names:
        print(f"{name}: {ENVIRONMENTS / name}", flush=True)
        try:
            install(name)
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {name}: pip failed with exit code {error.returncode}. See above, then try again")


if __name__ == "__main__":
    main()
