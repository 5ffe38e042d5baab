"""Checks of a regularizer's settings."""

from __future__ import annotations

import math
import numbers
from typing import Any

from torch import Tensor

from inn_guard.core.invertible import Invertible

__all__ = ["check_batch", "check_coefficient", "is_number"]


def check_batch(model: Any, x: Any, z: Any) -> None:
    """Refuse what is no map with a batch of data.

    Raises:
        TypeError: if ``model`` is no Invertible, or x or z no tensor.
        ValueError: if x is no batch.
    """
    if not isinstance(model, Invertible):
        raise TypeError(f"expected an Invertible, got {type(model).__name__}: pass wrap(model)")
    for name, value in (("x", x), ("z", z)):
        if not isinstance(value, Tensor) and (name == "x" or value is not None):
            raise TypeError(f"expected {name} as a tensor (B, ...); got {type(value).__name__}")
    if isinstance(z, Tensor) and z.dim() < 2:
        raise ValueError(f"expected z of shape (B, *latent); got {tuple(z.shape)}")
    if x.dim() < 2:
        raise ValueError(f"expected x of shape (B, *data); got {tuple(x.shape)}")


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
