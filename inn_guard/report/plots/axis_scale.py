"""Which axis fits a set of numbers, linear or logarithmic, and where on it they lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inn_guard.report.formatting import format_number, legible, power_of_ten, title

__all__ = ["Scale", "scale_for", "to_numpy"]

#: Positive numbers that differ by more than this factor are told apart on a logarithmic axis only.
_WIDE = 30.0


@dataclass(frozen=True)
class Scale:
    """Positions of numbers on an axis: log10(value) if ``logarithmic``, else value / 10^power.

    Attributes:
        logarithmic: whether ticks are powers of ten.
        power: of the unit of a linear axis. It keeps numbers near the ends of float64 within what a
            plot can place.
        exponents: whether the numbers are logarithms already, as those of a quantity named log10_*
            are; they are placed as they come, and read as the powers of ten that they stand for.
    """

    logarithmic: bool
    power: int = 0
    exponents: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where ``values`` lie; NaN where one has no place: not finite, or no logarithm."""
        shown = values
        with np.errstate(all="ignore"):
            if self.logarithmic and not self.exponents:
                shown = np.log10(values)
            elif not self.logarithmic:
                shown = values / 10.0**self.power
        return np.where(np.isfinite(shown), shown, np.nan)

    def text(self, value: float) -> str:
        """One of the numbers as a caption names it."""
        if not self.exponents:
            return format_number(value)
        if value == -math.inf:
            return "0"
        return power_of_ten(value) if math.isfinite(value) else format_number(value)

    def label(self, name: str, unit: str = "") -> str:
        """The quantity with its unit and, where the axis is scaled, the power of ten."""
        text = title(name)
        if self.exponents:
            # the ticks are powers of ten, not exponents: the quantity itself is read there
            text = title(name.removeprefix("log10_"))
            unit = unit.removeprefix("log10").strip()
        if self.power:
            unit = f"{power_of_ten(self.power)} {unit}".strip()
        return legible(f"{text} [{unit}]" if unit else text)


def scale_for(values: np.ndarray, name: str = "") -> Scale:
    """The axis that fits the finite ones of ``values``.

    Args:
        values: the numbers.
        name: the quantity. One named log10_* is a logarithm already; so is a number of digits.
    """
    if name.startswith("log10_"):
        return Scale(logarithmic=True, exponents=True)
    if name.startswith("digits"):
        return Scale(logarithmic=False)
    shown = values[np.isfinite(values)]
    positive = shown[shown > 0]
    if positive.size and not (shown < 0).any():
        spread = positive.max() > 1e4 or positive.min() < positive.max() / _WIDE
        if spread or (positive.size == shown.size and positive.max() < 1e-3):
            return Scale(logarithmic=True)
    largest = np.abs(shown).max(initial=0.0)
    if largest == 0 or 1e-2 <= largest < 1e4:
        return Scale(logarithmic=False)
    # 10 to a power below -300 would be subnormal
    return Scale(logarithmic=False, power=max(int(np.floor(np.log10(largest))), -300))


def to_numpy(values: Tensor) -> np.ndarray:
    """A detached float64 copy on the CPU."""
    return values.detach().to("cpu", torch.float64).numpy()
