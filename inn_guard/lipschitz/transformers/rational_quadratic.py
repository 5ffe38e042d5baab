"""Rational-quadratic splines: enclosures of values and of derivatives in the raw parameters."""

# Methods without a docstring are documented in Transformer.
# ruff: noqa: D102

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from inn_guard.lipschitz.transformers.base import (
    clamped,
    ones,
    product_with_complement,
    softplus,
    softplus_slope,
)
from inn_guard.lipschitz.transformers.spline import MonotoneSpline, SoftmaxBounds, position_in
from inn_guard.numerics.intervals import Interval

__all__ = ["RationalQuadraticSpline"]


@dataclass(frozen=True)
class RationalQuadraticSpline(MonotoneSpline):
    """Monotone rational-quadratic spline of raw widths, heights and inner (or all) derivatives.

    widths = (right - left) (min_width + (1 - bins min_width) softmax(raw / temperature)), heights
    alike, derivatives = min_derivative + softplus(raw). With tails the outer derivatives are 1.

    Attributes:
        floors: least share of a width, least share of a height, least derivative.
        temperature: raw widths and heights are divided by it.

    References:
        Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019).
    """

    floors: tuple[float, float, float] = (1e-3, 1e-3, 1e-3)
    temperature: float = 1.0

    @property
    def count(self) -> int:
        if self.tails:
            return 3 * self.bins - 1
        return 3 * self.bins + 1

    def derivative(self, raw: Interval) -> Interval:
        """The derivative at a knot."""
        return softplus(raw) + self.floors[2]

    def derivative_rate(self, raw: Interval) -> Interval:
        """d derivative / d raw."""
        return softplus_slope(raw)

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """y_k + h_k alpha."""
        y = self._in_each_bin(x, theta, lambda b: [b.y + b.h * b.alpha], outside=None)[0]
        return self._within_range(y, x)

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        return self._in_each_bin(x, theta, lambda b: [b.slope], outside=1.0)[0]

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        def in_bin(b: _Bin) -> list[Interval]:
            return b.sensitivities(Interval.of(1.0), b.slope)

        return self._in_each_bin(x, theta, in_bin, outside=0.0)

    def log_sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """(df/dtheta) / f', the derivative in the knots' x being exactly minus one."""

        def in_bin(b: _Bin) -> list[Interval]:
            return b.sensitivities(b.slope.reciprocal(), Interval.of(1.0))

        return self._in_each_bin(x, theta, in_bin, outside=0.0)

    def _in_each_bin(
        self,
        x: Interval,
        theta: list[Interval],
        quantities: Callable[[_Bin], list[Interval]],
        *,
        outside: float | None,
    ) -> list[Interval]:
        knots = _Knots.of(self, theta)

        def in_bin(k: int) -> list[Interval]:
            return quantities(_Bin(self, knots, k, x))

        return self._over_bins(x, in_bin, knots.x, outside=outside)


@dataclass(frozen=True)
class _Knots:
    """Enclosures of a spline's knots: positions, widths, heights, derivatives, and their origin."""

    widths: SoftmaxBounds
    heights: SoftmaxBounds
    x: list[Interval]
    y: list[Interval]
    w: list[Interval]
    h: list[Interval]
    d: list[Interval]
    d_rates: list[Interval]

    @classmethod
    def of(cls, spline: RationalQuadraticSpline, theta: list[Interval]) -> _Knots:
        """From the raw parameters."""
        n, scale = spline.bins, 1.0 / Interval.of(spline.temperature)
        widths = SoftmaxBounds.of([u * scale for u in theta[:n]])
        heights = SoftmaxBounds.of([u * scale for u in theta[n : 2 * n]])
        x, w = _laid_out(spline, widths, spline.floors[0])
        y, h = _laid_out(spline, heights, spline.floors[1])
        d = [spline.derivative(u) for u in theta[2 * n :]]
        rates = [spline.derivative_rate(u) for u in theta[2 * n :]]
        if spline.tails:
            d = [ones(theta[0]), *d, ones(theta[0])]
        return cls(widths, heights, x, y, w, h, d, rates)


def _laid_out(
    spline: RationalQuadraticSpline, shares: SoftmaxBounds, floor: float
) -> tuple[list[Interval], list[Interval]]:
    """Positions of the knots and lengths of the bins, along one axis."""
    size, least = spline.right - spline.left, Interval.of(floor)
    free = 1.0 - least * float(spline.bins)
    positions, lengths = [], []
    for k, p in enumerate(shares.before):
        positions.append((p * free + least * float(k)) * size + spline.left)
    for p in shares.each:
        lengths.append((p * free + floor) * size)
    return positions, lengths


class _Bin:
    """The spline in bin k at xi = (x - x_k) / w, eta = 1 - xi.

    f = y + h alpha, alpha = N / D, N = s xi^2 + d0 xi eta, D = s (1 - 2 xi eta) + (d0 + d1) xi eta.
    """

    def __init__(self, spline: RationalQuadraticSpline, knots: _Knots, k: int, x: Interval) -> None:
        self.spline, self.knots, self.k = spline, knots, k
        self.y, self.h = knots.y[k], knots.h[k]
        self.d0, self.d1 = knots.d[k], knots.d[k + 1]
        self.s = self.h / knots.w[k]
        self.xi = position_in(x, knots.x[k], knots.w[k])
        self.eta = 1.0 - self.xi
        self.xi_eta = product_with_complement(self.xi)
        self.D = self.s * (1.0 - self.xi_eta * 2.0) + (self.d0 + self.d1) * self.xi_eta
        self.alpha = clamped((self.s * self.xi.square() + self.d0 * self.xi_eta) / self.D, 0.0, 1.0)

    @functools.cached_property
    def inverse_square(self) -> Interval:
        """1 / D^2."""
        return self.D.square().reciprocal()

    @functools.cached_property
    def share(self) -> Interval:
        """s / D: as xi eta <= 1/4, D >= s / 2."""
        return clamped(self.s / self.D, 0.0, 2.0)

    @functools.cached_property
    def first(self) -> Interval:
        """d0 xi eta / D, a part of D."""
        return clamped(self.d0 * self.xi_eta / self.D, 0.0, 1.0)

    @functools.cached_property
    def last(self) -> Interval:
        """d1 xi eta / D, a part of D."""
        return clamped(self.d1 * self.xi_eta / self.D, 0.0, 1.0)

    @functools.cached_property
    def slope(self) -> Interval:
        """f' = s^2 (d1 xi^2 + 2 s xi eta + d0 eta^2) / D^2, within its bounds by convexity."""
        mean = self.d1 * self.xi.square() + self.s * self.xi_eta * 2.0 + self.d0 * self.eta.square()
        natural = self.s.square() * mean * self.inverse_square
        # D <= max(s, s/2 + (d0 + d1)/4), so that f' >= s^2 min(d0, d1, s) / max(...)^2
        least = torch.minimum(torch.minimum(self.d0.lo, self.d1.lo), self.s.lo)
        widest = self.s.maximum(self.s * 0.5 + (self.d0 + self.d1) * 0.25).hi
        smallest_s = Interval(self.s.lo, self.s.lo)
        low = smallest_s.square() * Interval(least, least) / Interval(widest, widest).square()
        # f' <= max(d0, d1, 2 s), with some units in the last place to spare
        high = torch.maximum(torch.maximum(self.d0.hi, self.d1.hi), 2 * self.s.hi) * (1 + 1e-15)
        return Interval(torch.maximum(natural.lo, low.lo), torch.minimum(natural.hi, high))

    def sensitivities(self, unit: Interval, slope: Interval) -> list[Interval]:
        """(df/dtheta) times ``unit``; ``slope`` is a tighter enclosure of f' times ``unit``."""
        n, k = self.spline.bins, self.k
        widths, heights = self.knots.widths, self.knots.heights
        bent = self.d1 * self.xi.square() - self.d0 * self.eta.square()
        natural = self.s * self.xi_eta * bent * self.inverse_square
        shares = self.share * (self.last * self.xi.square() - self.first * self.eta.square())
        taller = natural.meet(shares)
        narrower = self.s * taller * unit
        free_width, free_height = self._free_lengths()
        by_width, by_height = [], []
        for j in range(n):
            shift = slope * widths.position_partial(j, k, self.xi)
            by_width.append(-(shift + narrower * widths.width_partial(j, k)) * free_width)
            rise = heights.position_partial(j, k, self.alpha)
            by_height.append((rise + taller * heights.width_partial(j, k)) * unit * free_height)
        return by_width + by_height + self._by_derivative(unit)

    def _free_lengths(self) -> tuple[Interval, Interval]:
        """What the softmaxes of widths and of heights share out, over the temperature."""
        scale = Interval.of(self.spline.right - self.spline.left) / self.spline.temperature
        count = float(self.spline.bins)
        by_width = scale * (1.0 - Interval.of(self.spline.floors[0]) * count)
        by_height = scale * (1.0 - Interval.of(self.spline.floors[1]) * count)
        return by_width, by_height

    def _by_derivative(self, unit: Interval) -> list[Interval]:
        size = self.h * self.xi_eta * self.inverse_square
        left = size * self.eta * (self.s * self.eta + self.d1 * self.xi)
        right = size * self.xi * (self.s * self.xi + self.d0 * self.eta)
        # D >= (d0 + d1) xi eta
        most = (self.d0 + self.d1).reciprocal().hi
        flat = self.h * (self.xi_eta / self.D).minimum(Interval(most, most))
        left = left.meet(flat * (self.share * self.eta.square() + self.last))
        right = right.meet(flat * (self.share * self.xi.square() + self.first))
        parts = [left * unit, -(right * unit)]
        rates = self.knots.d_rates
        result = [Interval.of(torch.zeros_like(self.xi.lo))] * len(rates)
        first = self.k
        if self.spline.tails:
            # the outermost derivatives are no parameters
            first = self.k - 1
        for index, part in enumerate(parts, start=first):
            if 0 <= index < len(rates):
                result[index] = part * rates[index]
        return result
