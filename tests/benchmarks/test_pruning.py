"""Pruned beginnings against others: claims are what the arms' losses say, and the page has the results' figures."""

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_page_and_picture_have_the_figures_of_the_results(shows_its_results):
    import pruning  # pyright: ignore[reportMissingImports]

    shows_its_results(pruning)


def run(*losses, right=0.1, masks=False):
    stage = {"curve": list(zip((0, 100), losses, strict=True)), "seconds": 1.0, "metrics": {"masks/hardness": 0.9}}
    return {"parent": stage, "core": stage, "right": right} | ({"masks": stage} if masks else {})


@pytest.fixture
def found():
    return {
        "from scratch": [run(7.0, 5.0), run(7.0, 5.2)],
        "magnitude": [run(6.0, 4.9, right=0.2), run(6.0, 5.3, right=0.15)],
        "activation": [run(6.0, 4.8), run(6.0, 4.9)],
        "learnt masks": [run(6.0, 4.7, masks=True), run(6.0, 4.9, masks=True)],
    }


def test_a_claim_is_the_least_gain_of_a_seed(found):
    import pruning  # pyright: ignore[reportMissingImports]

    result = pruning.summarise(found)
    assert [entry["value"] for entry in result["claims"]] == pytest.approx([-0.1, 0.05, 0.2, 0, 0.3, 0])
    assert [entry["holds"] for entry in result["claims"]] == [False, True, True, False, True, False]
    assert result["arms"]["activation"]["after"]["mean"] == pytest.approx(4.85)
    table = pruning.table(result)
    assert table[2] == "| from scratch | 7.000 ± 0.000 | 5.100 ± 0.141 |  | 0.100 ± 0.000 |"
    assert table[3] == "| magnitude | 6.000 ± 0.000 | 5.100 ± 0.283 | +0.100 -0.100 | 0.175 ± 0.035 |"


def test_the_picture_shows_every_arm_and_the_parent(found, tmp_path, monkeypatch):
    import pruning  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(pruning, "PICTURE", tmp_path / "pruning.svg")
    result = pruning.summarise(found)
    pruning.draw(result)
    drawn = pruning.PICTURE.read_text()
    ends = {"from scratch": 5.1, "magnitude": 5.1, "activation": 4.85, "learnt masks": 4.8, "the parent": 4.8}
    for name, loss in ends.items():
        assert f"<!-- {name}: {loss:.3f} -->" in drawn
