"""Numbers as people read them: four digits, powers of ten, and NaN and Inf by name."""

from __future__ import annotations

import math
import numbers
import unicodedata
from typing import Any, SupportsFloat

import torch
from torch import Tensor

__all__ = [
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
    """A number with four significant digits; whole numbers below a million in full; NaN, Inf and −Inf by name.

    >>> [format_number(value) for value in (3.0, 0.25, 6.8018e-21, 123456.0, float("nan"), float("-inf"))]
    ['3', '0.25', '6.802×10⁻²¹', '123456', 'NaN', '−Inf']
    """
    number = float(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Inf" if number > 0 else "−Inf"
    if number == int(number) and abs(number) < 1e6:
        return str(int(number)).replace("-", "−")
    digits, _, exponent = f"{number:.3e}".partition("e")
    power = int(exponent)
    if -3 <= power < 6:
        text = _without_zeros(f"{number:.{max(0, 3 - power)}f}")
    else:
        text = f"{_without_zeros(digits)}×10{str(power).translate(_SUPERSCRIPTS)}"
    return text.replace("-", "−")


def _without_zeros(digits: str) -> str:
    """Without the zeros after the decimal point that say nothing."""
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


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
    if factor == "10":
        return power_of_ten(whole + 1)
    if -2 <= whole <= 3:
        return format_number(float(factor) * 10.0**whole)
    return f"{factor}×10{str(whole).translate(_SUPERSCRIPTS)}"


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number or a tensor with a single one; truth values are not numbers."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def format_value(value: Any) -> str:
    """Any setting or table cell as text: numbers as `format_number` has them, collections item by item.

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
        return ", ".join(f"{key}: {format_value(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return f"({', '.join(format_value(item) for item in value)})"
    return str(value)


def legible(text: Any) -> str:
    r"""``text`` with characters that no file or page may hold (controls, lone surrogates) replaced by �.

    >>> legible("block\x00 1")
    'block� 1'
    """
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c
        for c in str(text)
    )


def title(name: str) -> str:
    """A quantity's or audit's name as words.

    >>> title("sigma_min_worst"), title("log_det")
    ('σ min worst', 'log det')
    """
    words = ["σ" if word == "sigma" else word for word in str(name).split("_")]
    return legible(" ".join(word for word in words if word))


def heading(name: str) -> str:
    """`title` with a capital at its beginning.

    >>> heading("log_det"), heading("sigma_max")
    ('Log det', 'σ max')
    """
    words = title(name)
    return words if words.startswith("σ") else words[:1].upper() + words[1:]


def sentence(text: str) -> str:
    """``text`` with a capital at its beginning, unless that is a name in code, and a full stop at its end.

    >>> sentence("it holds"), sentence("log_det is off")
    ('It holds.', 'log_det is off.')
    """
    words = legible(text).strip()
    first = words.split(" ", 1)[0].rstrip(":,")
    capital = (
        words[:1].upper() + words[1:]
        if first.isalpha() and first.isascii() and first.islower()
        else words
    )
    return capital if not words or words[-1] in ".!?…" else f"{capital}."
