"""The committed page says what the committed results say, and what falls short is on it."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def test_the_page_is_that_of_the_results():
    import page

    assert PAGE.read_text() == page.page(page.load())


def test_what_was_measured_on_a_gpu_has_its_own_versions_and_says_what_is_missing():
    import page

    parts = page.load()["gpu"]
    section = "\n".join(page.gpu_section(parts))
    for library in ("torch", "transformers"):
        assert f"{library} {parts['vocabulary']['machine']['libraries'][library]}" in section
    for name in page.GPU_VOCABULARY:  # measured, or said why not, or said that it was not
        assert page.NAMES[name] in section
    absent = {**parts["vocabulary"], "refused": {"liger": "ModuleNotFoundError: No module named 'liger_kernel'"}}
    said = "\n".join(page.gpu_section({"vocabulary": absent}))
    assert "Liger did not run here: `ModuleNotFoundError: No module named 'liger_kernel'`" in said
    found = {"ours, sdpa": {"seconds": {"median": 0.25}, "tokens_per_second": 4e3}}
    training = {"machine": absent["machine"], "model": "qwen2_0_5b", "batches": {"full rows": {"found": found}}}
    assert "| full rows | ours, sdpa | 250.0 | 4,000 |" in page.gpu_section({"training": training})


def test_a_claim_that_fails_is_said():
    import claims
    import page

    entry = claims.claim("Half as fast", 0.5, at_least=1.05)
    assert not entry["holds"]
    assert page.fallen_short([entry, claims.claim("As fast", 1.05, at_least=1.05)]) == [
        "- Half as fast: 0.5, at least 1.05."
    ]


def test_seeds_that_differ_as_much_as_they_gain_have_shown_nothing():
    import claims

    assert not claims.clearly("More", [-0.012, 0.014, 0.004], above=0.0)["holds"]
    shown = claims.clearly("More", [0.014, 0.004, 0.012], above=0.0)
    assert shown["holds"]
    assert shown["value"] == pytest.approx(0.01 - 2 * 0.0053 / 3**0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("bounds", "value", "holds"),
    [
        ({"above": 1.0}, 1.0, False),
        ({"at_least": 1.0}, 1.0, True),
        ({"at_most": 0.03}, 0.030001, False),
        ({"below": 1.0}, 0.999, True),
        ({"at_least": 0.03}, 0.68 - 0.65, True),
    ],
)
def test_bounds(bounds, value, holds):
    import claims

    assert claims.keeps(value, bounds) is holds
