"""Mixtures of a dense model against others: equal tokens of the same data, and a claim is the least gain of a seed."""

import pytest

from lightning_llm import compose, plan
from lightning_llm.pipeline.key import node_keys

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_page_and_picture_have_the_figures_of_the_results(shows_its_results):
    import upcycling  # pyright: ignore[reportMissingImports]

    shows_its_results(upcycling)


def test_arms_differ_in_where_they_begin_and_in_nothing_else():
    import upcycling  # pyright: ignore[reportMissingImports]

    data, tokens, sizes = set(), set(), {}
    for arm, words in upcycling.ARMS.items():
        whole = plan(compose("upcycling", overrides=words))
        keys = node_keys(whole.nodes)
        data.add(tuple(keys[name] for name in ("tokenizer", "pretrain", f"{upcycling.STAGE}.prepare")))
        [node] = [node for node in whole.nodes if node.name == upcycling.STAGE]
        tokens.add((node.figures["tokens"], node.figures["steps"]))
        sizes[arm] = node.figures["parameters"]
    assert len(data) == len(tokens) == 1
    assert sizes[upcycling.BASELINE] == sizes[upcycling.UPCYCLED] == sizes["slices as they are"]
    assert sizes["dense, trained on"] < sizes[upcycling.UPCYCLED] < sizes["whole copies"]


def run(*losses):
    return {
        "curve": [(100 * place, loss) for place, loss in enumerate(losses)],
        "parameters": {"total": 1_820_000, "active": 1_010_000},
        "seconds": 1.0,
        "dense": 4.75,
    }


def test_a_claim_is_the_least_gain_of_a_seed():
    import upcycling  # pyright: ignore[reportMissingImports]

    found = upcycling.summarise(
        {
            upcycling.BASELINE: [run(7.0, 5.0), run(7.0, 5.2)],
            upcycling.UPCYCLED: [run(6.0, 4.5), run(6.2, 5.3)],
        }
    )
    [claim] = found["claims"]
    assert (claim["value"], claim["holds"]) == (-0.1, False)
    arm = found["arms"][upcycling.UPCYCLED]
    assert arm["curve"] == pytest.approx([6.1, 4.9])
    assert arm["gain"]["values"] == pytest.approx([0.5, -0.1])
    table = upcycling.table(found)
    assert table[-1].startswith(f"| {upcycling.UPCYCLED} | 1.82M | 1.01M | 6.100 ± 0.141 | 4.900 ± 0.566 | +0.200 ± ")
    assert table[-1].endswith("| +0.500 -0.100 |")


def test_the_picture_shows_every_arm(tmp_path, monkeypatch):
    import upcycling  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(upcycling, "PICTURE", tmp_path / "upcycling.svg")
    result = upcycling.summarise({arm: [run(7.0, 6.0, 5.5, 5.0)] for arm in upcycling.ARMS})
    upcycling.draw(result)
    drawn = upcycling.PICTURE.read_text()
    for arm in upcycling.ARMS:
        assert f"<!-- {arm}: 5.000 -->" in drawn
    upcycling.draw(result)
    assert upcycling.PICTURE.read_text() == drawn
