"""What a coupling of an inverse direction does to one entry: the shift is taken off first, then a factor is applied.

normflows' layers map latent -> data by x = z / q + t, so data -> latent is z = (x - t) q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inn_guard.lipschitz.transformers.affine import ScaleBounds
from inn_guard.numerics.intervals import Interval

__all__ = ["ExpScale", "InverseSigmoidScale", "ShiftedBack", "ShiftedBackThenScaled"]


@dataclass(frozen=True)
class ShiftedBack:
    """x - t."""

    count = 1

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """x - t."""
        return x - theta[0]

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """One."""
        one = torch.ones_like(x.lo)
        return Interval(one, one)

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """Minus one."""
        return [-self.slope(x, theta)]

    relative = sensitivities


@dataclass(frozen=True)
class ShiftedBackThenScaled:
    """(x - t) q(s).

    Attributes:
        scale: q.
    """

    scale: ScaleBounds
    count = 2

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """(x - t) q."""
        return (x - theta[0]) * self.scale.value(theta[1])

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """The factor q."""
        return self.scale.value(theta[1])

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """-q for t, (x - t) q' for s."""
        t, s = theta
        return [-self.scale.value(s), (x - t) * self.scale.slope(s)]

    def relative(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """-1 for t, (x - t) q'/q for s."""
        t, s = theta
        one = torch.ones_like(x.lo)
        return [Interval(-one, -one), (x - t) * self.scale.log_slope(s)]


@dataclass(frozen=True)
class ExpScale:
    """q(s) = e^s, or e^-s.

    Attributes:
        falling: whether it is e^-s.
    """

    falling: bool = False

    def value(self, s: Interval) -> Interval:
        """The factor q."""
        return (-s if self.falling else s).exp()

    def slope(self, s: Interval) -> Interval:
        """q or -q."""
        return -self.value(s) if self.falling else self.value(s)

    def second_derivative(self, s: Interval) -> Interval:
        """q."""
        return self.value(s)

    def log_slope(self, s: Interval) -> Interval:
        """One or minus one."""
        one = torch.ones_like(s.lo)
        return Interval(-one, -one) if self.falling else Interval(one, one)


@dataclass(frozen=True)
class InverseSigmoidScale:
    """q(s) = 1 / sigmoid(s + offset) = 1 + e^-(s + offset)."""

    offset: float = 0.0

    def value(self, s: Interval) -> Interval:
        """The factor q."""
        return 1.0 + self._falling(s)

    def slope(self, s: Interval) -> Interval:
        """-e^-(s + offset)."""
        return -self._falling(s)

    def second_derivative(self, s: Interval) -> Interval:
        """e^-(s + offset)."""
        return self._falling(s)

    def log_slope(self, s: Interval) -> Interval:
        """-sigmoid(-(s + offset))."""
        p = (-(s + self.offset)).increasing(torch.sigmoid)
        return -Interval(p.lo.clamp_min(0), p.hi.clamp_max(1))

    def _falling(self, s: Interval) -> Interval:
        return (-(s + self.offset)).exp()
