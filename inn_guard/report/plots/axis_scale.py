"""Which axis fits a set of numbers, linear or logarithmic, and where on it they lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inn_guard.report.formatting import legible, power_of_ten

__all__ = ["Scale", "scale_for", "to_numpy"]

_WIDE = 30.0  # positive numbers that differ by more than this factor are told apart on a logarithmic axis only


@dataclass(frozen=True)
class Scale:
    """Positions of numbers on an axis: log10(value) where ``logarithmic``, else value / 10^power.

    Dividing by a power of ten keeps numbers near the ends of float64 within what a plot can place.
    """

    logarithmic: bool
    power: int = 0

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where ``values`` lie; NaN where they have no place: not finite, or not positive on a logarithmic axis."""
        with np.errstate(all="ignore"):
            shown = np.log10(values) if self.logarithmic else values / 10.0**self.power
        return np.where(np.isfinite(shown), shown, np.nan)

    def label(self, text: str, unit: str = "") -> str:
        """``text`` with its unit and, where the axis is scaled, the power of ten."""
        factor = power_of_ten(self.power) if self.power else ""
        return legible(f"{text} [{f'{factor} {unit}'.strip()}]" if factor or unit else text)


def scale_for(values: np.ndarray) -> Scale:
    """The axis that fits the finite ones of ``values``."""
    shown = values[np.isfinite(values)]
    positive = shown[shown > 0]
    if (
        positive.size
        and not (shown < 0).any()
        and (positive.max() > 1e4 or positive.min() < positive.max() / _WIDE)
    ):
        return Scale(logarithmic=True)
    if positive.size == shown.size and positive.size and positive.max() < 1e-3:
        return Scale(logarithmic=True)
    largest = np.abs(shown).max(initial=0.0)
    power = 0 if largest == 0 or 1e-2 <= largest < 1e4 else int(np.floor(np.log10(largest)))
    return Scale(logarithmic=False, power=max(power, -300))


def to_numpy(values: Tensor) -> np.ndarray:
    """A detached float64 copy on the CPU."""
    return values.detach().to("cpu", torch.float64).numpy()
