"""Transformers of an inverse direction: the shift is subtracted first, then a factor is applied.

normflows' layers map latent -> data by x = z / q + t, so data -> latent is z = (x - t) q.
"""

# Methods without a docstring are documented in Transformer and ScaleBounds.
# ruff: noqa: D102

from __future__ import annotations

from dataclasses import dataclass

import torch

from inn_guard.lipschitz.transformers.base import ScaleBounds, clamped, ones
from inn_guard.numerics.intervals import Interval

__all__ = ["ExpScale", "InverseSigmoidScale", "ShiftedBack", "ShiftedBackThenScaled"]


@dataclass(frozen=True)
class ShiftedBack:
    """x - t."""

    count = 1

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        return x - theta[0]

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        return ones(x)

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        return [-ones(x)]

    log_sensitivities = sensitivities


@dataclass(frozen=True)
class ShiftedBackThenScaled:
    """(x - t) q(s).

    Attributes:
        scale: q.
    """

    scale: ScaleBounds
    count = 2

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        return (x - theta[0]) * self.scale.value(theta[1])

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        return self.scale.value(theta[1])

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """-q for t, (x - t) q' for s."""
        t, s = theta
        return [-self.scale.value(s), (x - t) * self.scale.slope(s)]

    def log_sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """-1 for t, (x - t) q'/q for s."""
        t, s = theta
        return [-ones(x), (x - t) * self.scale.log_slope(s)]


@dataclass(frozen=True)
class ExpScale:
    """q(s) = e^s, or e^-s if ``falling``."""

    falling: bool = False

    def value(self, s: Interval) -> Interval:
        return self._signed(s).exp()

    def slope(self, s: Interval) -> Interval:
        return self._signed(self.value(s))

    def second_derivative(self, s: Interval) -> Interval:
        return self.value(s)

    def log_slope(self, s: Interval) -> Interval:
        return self._signed(ones(s))

    def _signed(self, x: Interval) -> Interval:
        if self.falling:
            return -x
        return x


@dataclass(frozen=True)
class InverseSigmoidScale:
    """q(s) = 1 / sigmoid(s + offset) = 1 + e^-(s + offset)."""

    offset: float = 0.0

    def value(self, s: Interval) -> Interval:
        return 1.0 + self._exponential(s)

    def slope(self, s: Interval) -> Interval:
        return -self._exponential(s)

    def second_derivative(self, s: Interval) -> Interval:
        return self._exponential(s)

    def log_slope(self, s: Interval) -> Interval:
        """q'/q = -sigmoid(-(s + offset))."""
        p = (-(s + self.offset)).increasing(torch.sigmoid)
        return -clamped(p, 0.0, 1.0)

    def _exponential(self, s: Interval) -> Interval:
        return (-(s + self.offset)).exp()
