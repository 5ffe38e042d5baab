"""Numbers and names in words: four digits, powers of ten, NaN and Inf by name."""

from __future__ import annotations

import math
import numbers
import unicodedata
from typing import Any, SupportsFloat

import torch
from torch import Tensor

__all__ = [
    "brief",
    "format_amount",
    "format_number",
    "format_value",
    "heading",
    "is_number",
    "legible",
    "power_of_ten",
    "sentence",
    "title",
]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_number(value: SupportsFloat) -> str:
    """A number with four significant digits; whole ones below a million in full; NaN, Inf by name.

    >>> [format_number(value) for value in (3.0, 0.25, 6.8018e-21, 123456.0)]
    ['3', '0.25', '6.802×10⁻²¹', '123456']
    >>> format_number(float("nan")), format_number(float("-inf"))
    ('NaN', '−Inf')
    """
    number = float(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "−Inf" if number < 0 else "Inf"
    if number == int(number) and abs(number) < 1e6:
        return str(int(number)).replace("-", "−")
    # the power of the rounded number: that of 999999.9 is 6
    digits, _, exponent = f"{number:.3e}".partition("e")
    power = int(exponent)
    if -3 <= power < 6:
        text = _without_zeros(f"{number:.{max(0, 3 - power)}f}")
    else:
        text = f"{_without_zeros(digits)}×10{str(power).translate(_SUPERSCRIPTS)}"
    return text.replace("-", "−")


def brief(value: SupportsFloat, *, digits: int = 2) -> str:
    """A number in a sentence; with a power of ten if it is small or large.

    Args:
        value: the number.
        digits: that are shown at least; whole numbers are shown in full.

    >>> [brief(value) for value in (3.24e-6, 0.0432, 1.26, 86.4, 12345.0, 4.2e11)]
    ['3.2e-06', '0.043', '1.3', '86', '12,345', '4.2e+11']
    >>> brief(86.42, digits=3), brief(0.5, digits=3), brief(0.0), brief(math.nan)
    ('86.4', '0.5', '0', 'nan')
    """
    number = float(value)
    if number == 0:
        return "0"
    if not 1e-3 <= abs(number) < 1e6:
        mantissa, sign, power = f"{number:.{digits - 1}e}".partition("e")
        return f"{_without_zeros(mantissa)}{sign}{power}"
    decimals = digits - 1 - math.floor(math.log10(abs(number)))
    return _without_zeros(f"{number:,.{max(0, decimals)}f}")


def _without_zeros(digits: str) -> str:
    """The digits without trailing zeros after the decimal point."""
    if "." not in digits:
        return digits
    return digits.rstrip("0").rstrip(".")


def format_amount(value: SupportsFloat, unit: str, *, short: bool = False) -> str:
    """A number with its unit; shares "of the draws" or "of the families" in per cent.

    Args:
        value: the number.
        unit: its unit.
        short: leave out the unit, but not the per cent sign.

    >>> format_amount(0.1, "nats"), format_amount(0.001, "of the draws")
    ('0.1 nats', '0.1 % of the draws')
    >>> format_amount(0.1, "nats", short=True), format_amount(0.001, "of the draws", short=True)
    ('0.1', '0.1 %')
    """
    number = format_number(value)
    if unit.startswith(("of the draws", "of the families")):
        number = f"{format_number(100 * float(value))} %"
    if short:
        return number
    if number == "1" and unit in ("degrees", "nats"):
        unit = unit.removesuffix("s")
    return f"{number} {unit}".strip()


def power_of_ten(power: SupportsFloat) -> str:
    """10 to ``power`` as text; also where it would not fit a float.

    >>> [power_of_ten(power) for power in (0.0, 3.0, -400.0, 0.5)]
    ['1', '10³', '10⁻⁴⁰⁰', '3.2']
    """
    exponent = float(power)
    whole = math.floor(exponent)
    if exponent == whole:
        return {0: "1", 1: "10"}.get(whole, f"10{str(whole).translate(_SUPERSCRIPTS)}")
    factor = f"{10 ** (exponent - whole):.2g}"
    if factor == "10":  # 9.96 is rounded up
        return power_of_ten(whole + 1)
    if -2 <= whole <= 3:
        return format_number(float(factor) * 10.0**whole)
    return f"{factor}×10{str(whole).translate(_SUPERSCRIPTS)}"


def is_number(value: Any) -> bool:
    """Whether this is a real number or a tensor with a single one; truth values are none."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def format_value(value: Any) -> str:
    """Any setting or table cell as text: numbers by `format_number`, collections item by item.

    >>> format_value({"eps": 1e-9, "checks": ("log_det", None), "exact": True})
    'eps: 1×10⁻⁹, checks: (log_det, none), exact: yes'
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        return format_number(float(value))
    if isinstance(value, dict):
        parts = []
        for key, item in value.items():
            parts.append(f"{key}: {format_value(item)}")
        return ", ".join(parts)
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(format_value, value))})"
    return str(value)


def legible(text: Any) -> str:
    r"""The text with � for characters that no file or page may hold: controls, lone surrogates.

    >>> legible("block\x00 1")
    'block� 1'
    """
    characters = list(str(text))
    for place, character in enumerate(characters):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            characters[place] = "\ufffd"
    return "".join(characters)


def title(name: str) -> str:
    """A quantity's or audit's name as words.

    >>> title("sigma_min_worst"), title("log_det")
    ('σ min worst', 'log det')
    """
    words = str(name).split("_")
    for place, word in enumerate(words):
        if word == "sigma":
            words[place] = "σ"
    return legible(" ".join(filter(None, words)))


def heading(name: str) -> str:
    """`title` with a capital at its beginning.

    >>> heading("log_det"), heading("sigma_max")
    ('Log det', 'σ max')
    """
    words = title(name)
    if words.startswith("σ"):
        return words
    return words[:1].upper() + words[1:]


def sentence(text: str) -> str:
    """The text with a capital at its beginning (but not in a name in code) and a full stop.

    >>> sentence("it holds"), sentence("log_det is off")
    ('It holds.', 'log_det is off.')
    """
    words = legible(text).strip()
    first = words.split(" ", 1)[0].rstrip(":,")
    if first.replace("-", "").isalpha() and first.isascii() and first.islower():
        words = words[:1].upper() + words[1:]
    if not words or words[-1] in ".!?…":
        return words
    return f"{words}."
