"""Numbers as text: right to the last digit shown, at every size a float has."""

from __future__ import annotations

import math
import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inn_guard.report.formatting import format_number, legible, power_of_ten

FROM_SUPERSCRIPT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")


def read_back(text: str) -> Decimal:
    digits, _, power = text.partition("×10")
    return Decimal(f"{digits.translate(FROM_SUPERSCRIPT)}e{power.translate(FROM_SUPERSCRIPT) or 0}")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_text_is_the_number_to_four_digits(value):
    assert abs(read_back(format_number(value)) - Decimal(value)) <= Decimal("5.01e-4") * abs(
        Decimal(value)
    )


@given(st.integers(-999_999, 999_999))
def test_whole_numbers_are_written_in_full(value):
    assert read_back(format_number(float(value))) == value


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "−Inf")]
)
def test_non_finite_numbers_have_names(value, text):
    assert format_number(value) == text


@given(st.floats(-300, 300))
def test_power_of_ten_is_right_to_two_digits(power):
    text = power_of_ten(power)
    shown = re.sub("^10(?=[⁻⁰¹²³⁴⁵⁶⁷⁸⁹])", "1×10", text)
    assert float(read_back(shown)) == pytest.approx(10.0**power, rel=0.051)


def test_power_of_ten_reaches_beyond_floats():
    assert power_of_ten(-5000.0) == "10⁻⁵⁰⁰⁰"
    assert power_of_ten(4000.5) == "3.2×10⁴⁰⁰⁰"


@given(st.text(st.characters(codec=None)))
def test_legible_text_can_always_be_encoded(text):
    assert "\x00" not in legible(text).encode("utf-8").decode("utf-8")
