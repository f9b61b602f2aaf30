"""The committed page says what the committed results say, and what falls short is on it."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def test_the_page_is_that_of_the_results():
    import page

    assert PAGE.read_text() == page.page(page.load())


def test_a_claim_that_fails_is_said():
    import claims
    import page

    entry = claims.claim("Half as fast", 0.5, at_least=1.05)
    assert not entry["holds"]
    assert page.fallen_short([entry, claims.claim("As fast", 1.05, at_least=1.05)]) == [
        "- Half as fast: 0.5, at least 1.05."
    ]


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
