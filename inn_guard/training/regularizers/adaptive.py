"""A regularizer whose coefficient is steered, so that a measured condition number keeps to its target."""

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
    """value * regularizer, the value raised while a condition number is above its target and lowered while below.

    With e = log10(condition number) - log10(target), in decades, each measurement moves the value by

        log10 value  +=  clip( gain e + damping (e - e_before), -rate, rate )        unless |e| <= tolerance

    and holds it within its bounds. The first term alone never rests, because a network answers a coefficient only after
    many steps; the second one holds it back while the condition number is on its way already. A condition number that
    is not finite raises the value by the full rate.

        coefficient = AdaptiveCoefficient(NormalizingFlowLoss(1.0), target=1e3)
        penalty = RegularizerHook(model, [coefficient], every=10)
        watch = AuditHook(model, checks=[...], every=50, actions=[Adapt(coefficient)])

    Args:
        regularizer: what is multiplied; give it the coefficient 1.
        target: condition number to hold, > 1.
        initial: the value before the first measurement.
        bounds: smallest and largest value.
        gain: decades of the value per decade of error and measurement.
        damping: decades of the value per decade by which the error has grown since the last measurement.
        rate: largest change of the value at one measurement, in decades.
        tolerance: errors up to this size change nothing, in decades.

    Attributes:
        value: the coefficient in force.

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
                f"expected a target condition number > 1, the least there is; got {self.target}"
            )
        if not 0 < low <= self.initial <= high < math.inf:
            raise ValueError(
                f"expected 0 < lower bound <= initial <= upper bound; got {self.initial} in {self.bounds}"
            )
        finite = max(self.gain, self.damping, self.rate, self.tolerance) < math.inf
        if not (
            finite and self.gain > 0 and self.damping >= 0 and self.rate > 0 and self.tolerance >= 0
        ):
            raise ValueError(
                "expected finite gain > 0, damping >= 0, rate > 0 and tolerance >= 0; "
                f"got {self.gain}, {self.damping}, {self.rate}, {self.tolerance}"
            )
        self.value = self.initial

    def __call__(
        self, model: Invertible, x: Shaped[Tensor, "batch *data"], z: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """The regularizer's penalty at a batch, times the value in force."""
        return self.value * self.regularizer(model, x, z)

    def update(self, log10_condition: float) -> float:
        """Take one measurement into account.

        Args:
            log10_condition: decimal logarithm of the condition number; NaN and inf mean that there is none.

        Returns:
            the new value.
        """
        error = log10_condition - math.log10(self.target)
        if not math.isfinite(error):
            error, change = math.nan, self.rate
        elif abs(error) <= self.tolerance:
            change = 0.0
        else:
            growth = 0.0 if math.isnan(self._error) else error - self._error
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
        """The value in force and the last error: what resuming a run takes."""
        return {"value": self.value, "error": self._error}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.value, self._error = float(state["value"]), float(state["error"])
