"""Checks of a regularizer's settings."""

from __future__ import annotations

import math
import numbers

__all__ = ["check_coefficient", "is_number"]


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number; strings and booleans are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_coefficient(value: object) -> None:
    """Refuse a coefficient that cannot weigh a penalty.

    Raises:
        ValueError: if it is not a finite number >= 0.
    """
    try:
        fits = is_number(value) and 0 <= float(value) < math.inf  # type: ignore[arg-type]
    except OverflowError:
        fits = False
    if not fits:
        raise ValueError(f"expected a finite coefficient >= 0; got {value!r}")
