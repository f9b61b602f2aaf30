"""The page on reward models says what the committed results say, and calibrations of several models go together."""

import json
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "reward_models.md"


def test_the_page_has_the_figures_of_the_results(benchmarks):
    import reward_models  # pyright: ignore[reportMissingImports]

    result = json.loads(reward_models.RESULT.read_text())
    page = PAGE.read_text("utf-8")
    for table in (reward_models.metric_table, reward_models.calibration_table):
        assert "\n".join(table(result["losses"])) in page
    main = result["losses"][reward_models.MAIN]["metrics"][reward_models.ACCURACY]["values"]
    assert len(main) == len(result["seeds"]) >= 3
    assert [claim["value"] for claim in result["claims"]] == pytest.approx([sum(main) / len(main), min(main)], abs=1e-4)
    assert reward_models.PICTURE.is_file()


def entry(accuracy, *bins):
    each = [
        {"begin": begin, "end": begin + 0.05, "pairs": pairs, "predicted": predicted, "frequency": frequency}
        for begin, pairs, predicted, frequency in bins
    ]
    figures = {"accuracy": accuracy, "predicted": 0.7, "calibration_error": 0.1}
    return {"strength": "all", "pairs": sum(pairs for _, pairs, _, _ in bins), **figures, "bins": each}


def test_bins_are_weighted_by_their_pairs(benchmarks):
    import reward_models  # pyright: ignore[reportMissingImports]

    found = reward_models.pooled(
        [entry(0.8, (0.5, 10, 0.51, 0.4), (0.9, 30, 0.92, 1.0)), entry(0.9, (0.9, 10, 0.94, 0.8), (0.95, 5, 0.97, 1.0))]
    )
    assert found["pairs"] == 55
    assert found["accuracy"] == pytest.approx(0.85)
    assert [(each["begin"], each["pairs"]) for each in found["bins"]] == [(0.5, 10), (0.9, 40), (0.95, 5)]
    assert found["bins"][1]["predicted"] == pytest.approx((30 * 0.92 + 10 * 0.94) / 40)
    assert found["bins"][1]["frequency"] == pytest.approx((30 * 1.0 + 10 * 0.8) / 40)
