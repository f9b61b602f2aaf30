"""Maps of needles, and what gates have made of them, in words."""

from pathlib import Path

import pytest

from lightning_llm.report.needles import answers_said, gate_rows
from lightning_llm.report.record import Node, Run


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        ([{"answer": "greedy", "chance": 1e-4}], "the model spells it (by chance 0.0001)"),
        ([{"answer": "likelihood", "chance": 0.1}] * 2, "it is likelier than all wrong ones (by chance 0.1)"),
        ([{"answer": "likelihood"}], "it is likelier than all wrong ones"),  # of an older artifact
    ],
)
def test_what_counts_as_found_is_said(grids, said):
    assert answers_said(grids) == said


def test_each_question_of_a_gate_has_its_verdict():
    content = {
        "wanted": {"short_context": 0.05, "needle": 0.9},
        "found": {"gate/short_context": None, "gate/needle": 0.95},  # no finite number
        "stops": {"what": "...", "remedy": "..."},
    }
    asked = Node("long.gate", "gate", {}, {}, {}, files={"gate.json": content})
    plain = Node("short.gate", "gate", {}, {}, {}, files={"gate.json": {"wanted": {"needle": None}, "found": {}}})
    assert gate_rows(Run(Path(), {}, {}, {}, [asked, plain], [])) == [
        ["long", "rise of perplexity on short texts, worst domain", "at most 5.0 %", "-", "stopped the run"],
        ["long", "needles found, worst length", "at least 90.0 %", "95.0 %", "passed"],
    ]
