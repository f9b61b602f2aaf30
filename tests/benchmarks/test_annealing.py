"""The page on annealing says what the committed results say; what is made of metrics, by hand."""

import json
import math
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "annealing.md"


def test_the_page_has_the_figures_of_the_results(benchmarks):
    import annealing  # pyright: ignore[reportMissingImports]

    result = json.loads(annealing.RESULT.read_text())
    page = PAGE.read_text("utf-8")
    for table in (annealing.average_table(result), annealing.data_table(result)):
        assert "\n".join(table) in page
    assert result.keys() <= set(annealing.PARTS)
    for part, content in result.items():
        assert len(content["seeds"]) >= 3
        assert annealing.verdicts(part, content["found"]) == content["claims"]
    assert annealing.PICTURE.is_file()
    assert annealing.PICTURE.name in page


def test_gains_are_of_the_same_seed(benchmarks):
    import annealing  # pyright: ignore[reportMissingImports]

    def run(web, code, last):
        names = {
            "perplexity/web": web,
            "perplexity/code": code,
            "last/perplexity/web": last,
            "last/perplexity/code": last,
        }
        return {name: math.exp(nats) for name, nats in names.items()} | {"tasks/exact_match": web / 10}

    [found] = annealing.averaged({"one": [run(1, 2, 3), run(2, 2, 2.5)]}).values()
    assert found["average"]["values"] == pytest.approx([1.5, 2])
    assert found["gain"]["values"] == pytest.approx([1.5, 0.5])
    both = annealing.judged({annealing.DEFAULT: [run(1, 2, 0), run(2, 2, 0)], "other": [run(2, 2, 0), run(1, 1, 0)]})
    assert both["other"]["change"]["values"] == pytest.approx([0.5, -1])
    assert both["other"]["right_change"]["values"] == pytest.approx([0.1, -0.1])
    assert both["other"]["domains"]["web"]["values"] == pytest.approx([1, -1])
    assert both[annealing.DEFAULT]["change"]["values"] == [0, 0]


def test_scrambled_text_has_the_same_words(benchmarks, tmp_path):
    import annealing  # pyright: ignore[reportMissingImports]

    from lightning_llm.data.embedded.text import READERS

    rows = [json.loads(line) for line in annealing.scrambled(tmp_path / "rows.jsonl").read_text().splitlines()]
    originals = [text for _, text in READERS["web"]()]
    assert len(rows) == len(originals)
    assert rows[0]["text"] != originals[0]
    assert sorted(rows[0]["text"].split()) == sorted(originals[0].split())
