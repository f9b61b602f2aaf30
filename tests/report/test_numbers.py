"""Numbers as a reader wants them."""

import math

import pytest

from lightning_llm.report.numbers import digits, duration, figure, flops, measure, quantity, share, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (812, "812"),
        (9999, "9,999"),
        (15_400, "15.4 k"),
        (2_050_000, "2.05 M"),
        (7e12, "7 T"),
        (3e22, "3.00e+22"),
    ],
)
def test_quantities(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (812, "812 B"), (1023, "1023 B"), (1024, "1 KiB"), (3_250_000, "3.1 MiB"), (5 * 2**40, "5 TiB")],
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (200, "3 min 20 s"),
        (3660, "1 h 1 min"),
        (4 * 86400, "4.0 days"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.6219, "0.622"), (38.724, "38.72"), (1234.5, "1,234"), (-0.5, "-0.500")])
def test_measures_keep_their_decimals(value, text):
    assert measure(value) == text


@pytest.mark.parametrize("write", [quantity, duration, figure, flops, measure, share])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_no_number_is_a_dash(write, value):
    assert write(value) == "-"


def test_drawings_get_five_digits():
    assert digits(0.123456789) == 0.12346
    assert digits(math.nan) is None
    assert digits(1234567) == 1234567
