"""A regularizer whose coefficient adapts, so that a measured condition number stays at a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from inn_guard.core.invertible import Invertible

__all__ = ["AdaptiveCoefficient"]


@dataclass(eq=False)
class AdaptiveCoefficient:
    """value * regularizer; the value rises while a condition number is above its target.

    With e = log10(condition number) - log10(target), in decades, each measurement changes it by

        log10 value  +=  clip( gain e + damping (e - e_before), -rate, rate )

    within its bounds, and not at all if |e| <= tolerance. A network responds to a coefficient only
    after many steps, so the first term alone keeps oscillating; the second one damps it. A
    condition number that is not finite raises the value by the full rate.

        coefficient = AdaptiveCoefficient(NormalizingFlowLoss(1.0), target=1e3)
        penalty = RegularizerHook(model, coefficient, every=10)
        adapt = AdaptCoefficient(coefficient)
        watch = AuditHook(model, checks=["jacobian_spectrum"], every=50, actions=[adapt])

    Args:
        regularizer: what is multiplied; give it the coefficient 1.
        target: condition number to hold, > 1.
        initial: the value before the first measurement.
        bounds: smallest and largest value.
        gain: decades of the value per decade of error and measurement.
        damping: decades of the value per decade of growth of the error since the last measurement.
        rate: largest change of the value at one measurement, in decades.
        tolerance: errors up to this size change nothing, in decades.

    Attributes:
        value: the current coefficient.

    Raises:
        ValueError: if a setting is out of its range.
    """

    regularizer: Callable[..., Tensor]
    _: KW_ONLY
    target: float
    initial: float = 1e-4
    bounds: tuple[float, float] = (1e-8, 1e2)
    gain: float = 0.5
    damping: float = 1.0
    rate: float = 0.5
    tolerance: float = 0.05
    value: float = field(init=False)
    _error: float = field(init=False, default=math.nan, repr=False)

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not 1 < self.target < math.inf:
            raise ValueError(
                f"expected a target condition number > 1, the least possible; got {self.target}"
            )
        if not 0 < low <= self.initial <= high < math.inf:
            raise ValueError(
                "expected 0 < lower bound <= initial <= upper bound; "
                f"got {self.initial} in {self.bounds}"
            )
        finite = max(self.gain, self.damping, self.rate, self.tolerance) < math.inf
        positive = self.gain > 0 and self.rate > 0
        if not (finite and positive and self.damping >= 0 and self.tolerance >= 0):
            raise ValueError(
                "expected finite gain > 0, damping >= 0, rate > 0 and tolerance >= 0; "
                f"got {self.gain}, {self.damping}, {self.rate}, {self.tolerance}"
            )
        self.value = self.initial

    def __call__(
        self, model: Invertible, x: Shaped[Tensor, "batch *data"], z: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """The regularizer's penalty at a batch, times the current value."""
        return self.value * self.regularizer(model, x, z)

    def update(self, log10_condition: float) -> float:
        """Adapt the value to one measurement.

        Args:
            log10_condition: decimal logarithm of the condition number; NaN or inf if it is not
                finite.

        Returns:
            the new value.
        """
        error = log10_condition - math.log10(self.target)
        if not math.isfinite(error):
            error, change = math.nan, self.rate
        elif abs(error) <= self.tolerance:
            change = 0.0
        else:
            growth = error - self._error
            if math.isnan(growth):  # the first measurement, or the last one was not finite
                growth = 0.0
            change = min(max(self.gain * error + self.damping * growth, -self.rate), self.rate)
        self._error = error
        low, high = self.bounds
        self.value = min(max(self.value * 10**change, low), high)
        return self.value

    @property
    def generator(self) -> torch.Generator | None:
        """The regularizer's source of noise, if it has one."""
        return getattr(self.regularizer, "generator", None)

    def state_dict(self) -> dict[str, Any]:
        """The current value and the last error, to resume a run."""
        return {"value": self.value, "error": self._error}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.value, self._error = float(state["value"]), float(state["error"])
