"""What merging of steps changes is said against plain DPO of the same seed."""

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


def metrics(exact, code):
    return {"tasks/exact_match": exact, "preference/accuracy": 1.0, "kl/reference": 0.5, "perplexity/code": code}


@pytest.fixture
def found():
    import online_merging  # pyright: ignore[reportMissingImports]

    plain, *others = online_merging.ARMS
    seeds = {arm: [metrics(0.7, 130.0), metrics(0.6, 119.0)] for arm in others}
    return {plain: [metrics(0.6, 135.0), metrics(0.8, 121.0)], **seeds}


def test_changes_are_within_a_seed(found, tmp_path, monkeypatch):
    import online_merging  # pyright: ignore[reportMissingImports]

    result = online_merging.summarise(found)
    assert all(each["holds"] and each["value"] == -3.5 for each in result["claims"])
    exact = result["arms"]["OnTIES, alpha 0.001"]["change"]["tasks/exact_match"]
    assert exact["values"] == pytest.approx([0.1, -0.2])
    assert online_merging.table(result)[2].startswith("| AdamW | 0.700 ± 0.141 | 1.000 ± 0.000 | 0.500")
    monkeypatch.setattr(online_merging, "PICTURE", tmp_path / "online_merging.svg")
    online_merging.draw(result)
    assert online_merging.PICTURE.read_text().count("OnDARE, alpha 0.01") == 1
