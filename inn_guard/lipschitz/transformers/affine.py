"""Additive and affine transformers, scales g(s), and transformers of functions of parameters."""

# Methods without a docstring are documented in Transformer and ScaleBounds.
# ruff: noqa: D102

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inn_guard.lipschitz.networks.activations import Activation, known_activation
from inn_guard.lipschitz.transformers.base import (
    ScaleBounds,
    Transformer,
    clamped,
    ones,
    product_with_complement,
    softplus,
    softplus_curvature,
    softplus_slope,
)
from inn_guard.numerics.intervals import Interval

__all__ = [
    "EXPONENTIAL",
    "Additive",
    "Affine",
    "ConstantScale",
    "InverseSigmoidScale",
    "LogScale",
    "Reparametrised",
    "ShiftedThenScaled",
    "SigmoidScaleBounds",
    "SoftplusScaleBounds",
]


@dataclass(frozen=True)
class Additive:
    """x + t."""

    count = 1

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        return x + theta[0]

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        return ones(x)

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        return [ones(x)]

    log_sensitivities = sensitivities


@dataclass(frozen=True)
class Affine:
    """x * g(s) + t.

    Attributes:
        scale: g.
        order: positions of t and of s among the parameters.
    """

    scale: ScaleBounds
    order: tuple[int, int] = (0, 1)
    count = 2

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        t, s = self._shift_and_scale(theta)
        return x * self.scale.value(s) + t

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        _, s = self._shift_and_scale(theta)
        return self.scale.value(s)

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """1 for t, x g' for s."""
        _, s = self._shift_and_scale(theta)
        return self._in_order(ones(x), x * self.scale.slope(s))

    def log_sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """1/g for t, x g'/g for s."""
        _, s = self._shift_and_scale(theta)
        return self._in_order(self.scale.value(s).reciprocal(), x * self.scale.log_slope(s))

    def _shift_and_scale(self, theta: list[Interval]) -> tuple[Interval, Interval]:
        return theta[self.order[0]], theta[self.order[1]]

    def _in_order(self, t: Interval, s: Interval) -> list[Interval]:
        if self.order == (0, 1):
            return [t, s]
        return [s, t]


@dataclass(frozen=True)
class ShiftedThenScaled:
    """(x - t) q(s), the inverse of z / q(s) + t; parameters t, s.

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
class SigmoidScaleBounds:
    """g(s) = lower + (upper - lower) sigmoid(s + offset).

    With w = upper - lower and a = lower / w, g'/g = p (1 - p) / (a + p) for p = sigmoid; it is
    largest, 1 + 2a - 2 sqrt(a^2 + a), at p = sqrt(a^2 + a) - a.
    """

    lower: float
    upper: float
    offset: float = 0.0

    def value(self, s: Interval) -> Interval:
        return self._sigmoid(s) * self._width() + self.lower

    def slope(self, s: Interval) -> Interval:
        return product_with_complement(self._sigmoid(s)) * self._width()

    def second_derivative(self, s: Interval) -> Interval:
        """g'' = w p (1 - p) (1 - 2 p)."""
        return self.slope(s) * (1.0 - self._sigmoid(s) * 2.0)

    def log_slope(self, s: Interval) -> Interval:
        """g'/g rises to its maximum in p and falls, from p = 0 to 1."""
        a = Interval.of(self.lower) / self._width()
        s = s + self.offset
        low, high = self._log_slope_at(s.lo, a), self._log_slope_at(s.hi, a)
        lo, hi = torch.minimum(low.lo, high.lo).clamp_min(0), torch.maximum(low.hi, high.hi)
        if not self.lower:
            return Interval(lo, hi)
        root = (a.square() + a).sqrt()
        largest, position = 1.0 + a * 2.0 - root * 2.0, root - a
        p = s.increasing(torch.sigmoid)
        inside = (p.lo <= position.hi + 1e-9) & (p.hi >= position.lo - 1e-9)
        return Interval(lo, torch.where(inside, torch.maximum(hi, largest.hi), hi))

    def _log_slope_at(self, end: Tensor, a: Interval) -> Interval:
        point = Interval(end, end)
        if not self.lower:
            return 1.0 - point.increasing(torch.sigmoid)
        # p / (a + p) = 1 / (1 + a (1 + e^-s)), without 0 / 0 where p underflows
        return (-point).increasing(torch.sigmoid) / (a * (1.0 + (-point).exp()) + 1.0)

    def _sigmoid(self, s: Interval) -> Interval:
        return clamped((s + self.offset).increasing(torch.sigmoid), 0.0, 1.0)

    def _width(self) -> Interval:
        return Interval.of(self.upper) - self.lower


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


@dataclass(frozen=True)
class SoftplusScaleBounds:
    """g(s) = softplus(s) + floor; g'/g <= 1 because log(1 + u) >= u / (1 + u)."""

    floor: float

    def value(self, s: Interval) -> Interval:
        return softplus(s) + self.floor

    def slope(self, s: Interval) -> Interval:
        return softplus_slope(s)

    def second_derivative(self, s: Interval) -> Interval:
        return softplus_curvature(s)

    def log_slope(self, s: Interval) -> Interval:
        ratio = self.slope(s) / self.value(s)
        return Interval(ratio.lo.clamp_min(0), ratio.hi.clamp_max(1))


@dataclass(frozen=True)
class LogScale:
    """g(s) = exp(f(s))."""

    log: Activation

    def value(self, s: Interval) -> Interval:
        return self.log.value(s).exp()

    def slope(self, s: Interval) -> Interval:
        return self.value(s) * self.log.slope(s)

    def second_derivative(self, s: Interval) -> Interval:
        """g'' = e^f (f'^2 + f'')."""
        return self.value(s) * (self.log.slope(s).square() + self.log.second_derivative(s))

    def log_slope(self, s: Interval) -> Interval:
        return self.log.slope(s)


EXPONENTIAL = LogScale(known_activation(nn.Identity()))  #: e^s


@dataclass(frozen=True)
class ConstantScale:
    """A scale of which only global constants are known: lower <= g <= upper, |g'| and |g'/g|."""

    lower: float
    upper: float
    max_slope: float
    max_log_slope: float

    def value(self, s: Interval) -> Interval:
        return self._between(s, self.lower, self.upper)

    def slope(self, s: Interval) -> Interval:
        return self._between(s, -self.max_slope, self.max_slope)

    def log_slope(self, s: Interval) -> Interval:
        return self._between(s, -self.max_log_slope, self.max_log_slope)

    def second_derivative(self, s: Interval) -> Interval:
        """Unknown: everything."""
        return self._between(s, -math.inf, math.inf)

    @staticmethod
    def _between(s: Interval, lo: float, hi: float) -> Interval:
        # the constants are results of a few roundings
        slack = 1e-14
        return Interval(
            torch.full_like(s.lo, lo - slack * abs(lo)), torch.full_like(s.hi, hi + slack * abs(hi))
        )


@dataclass(frozen=True)
class Reparametrised:
    """z = h(x; f_1(theta_1), ..., f_n(theta_n)).

    Attributes:
        inner: h.
        functions: f_k, one for each parameter of an entry.
    """

    inner: Transformer
    functions: Sequence[Activation]

    @property
    def count(self) -> int:
        return self.inner.count

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        return self.inner.value(x, self._parameters(theta))

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        return self.inner.slope(x, self._parameters(theta))

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """dh/df_k f_k'."""
        return self._times_rates(self.inner.sensitivities(x, self._parameters(theta)), theta)

    def log_sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        return self._times_rates(self.inner.log_sensitivities(x, self._parameters(theta)), theta)

    def _parameters(self, theta: list[Interval]) -> list[Interval]:
        return [function.value(u) for function, u in zip(self.functions, theta, strict=True)]

    def _times_rates(self, parts: list[Interval], theta: list[Interval]) -> list[Interval]:
        products = []
        for part, function, u in zip(parts, self.functions, theta, strict=True):
            products.append(part * function.slope(u))
        return products
