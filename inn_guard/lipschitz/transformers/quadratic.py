"""Piecewise quadratic splines, with a piecewise linear density, and their derivatives."""

# Methods without a docstring are documented in Transformer.
# ruff: noqa: D102

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from inn_guard.lipschitz.transformers.base import (
    clamped,
    hull_of,
    softplus,
    softplus_slope,
    weighted_sum,
)
from inn_guard.lipschitz.transformers.spline import MonotoneSpline, SoftmaxBounds, position_in
from inn_guard.numerics.intervals import Interval

__all__ = ["QuadraticSpline"]

LEAST = 1e-3  #: nflows adds it to each height before it normalises them


@dataclass(frozen=True)
class QuadraticSpline(MonotoneSpline):
    """f(u) = floor u + (1 - floor) G(u) / A, G the integral of a density p to u, A all of it.

    The density is linear between its knots, and u is x moved to [0, 1]. The parameters are raw
    widths and heights: w = min_width + (1 - bins min_width) softmax(raw / temperature) and
    e = softplus(raw / temperature of heights) + 1e-3 at the knots. With tails the outer heights are
    no parameters but both the same mean of the others.

    Attributes:
        floors: least share of a width, least density.
        temperatures: raw widths, and raw heights, are divided by them.

    References:
        Neural Importance Sampling (Mueller, McWilliams, Rousselle, Gross, Novak, 2019).
    """

    floors: tuple[float, float] = (1e-3, 1e-3)
    temperatures: tuple[float, float] = (1.0, 1.0)

    @property
    def count(self) -> int:
        if self.tails:
            return 2 * self.bins - 1
        return 2 * self.bins + 1

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """left + (right - left) f."""
        size = Interval.of(self.right) - self.left
        y = self._in_each_bin(x, theta, lambda b: [b.value * size + self.left], outside=None)[0]
        return self._within_range(y, x)

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """f' = floor + (1 - floor) p / A."""
        return self._in_each_bin(x, theta, lambda b: [b.slope], outside=1.0)[0]

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        return self._in_each_bin(x, theta, lambda b: b.sensitivities(), outside=0.0)

    def log_sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        def in_bin(b: _Bin) -> list[Interval]:
            return [part / b.slope for part in b.sensitivities()]

        return self._in_each_bin(x, theta, in_bin, outside=0.0)

    def _in_each_bin(
        self,
        x: Interval,
        theta: list[Interval],
        quantities: Callable[[_Bin], list[Interval]],
        *,
        outside: float | None,
    ) -> list[Interval]:
        density = _Density.of(self, theta)
        u = (x - self.left) / (Interval.of(self.right) - self.left)

        def in_bin(k: int) -> list[Interval]:
            return quantities(_Bin(density, k, u))

        return self._over_bins(x, in_bin, density.knots, outside=outside, position=u)


@dataclass(frozen=True)
class _Density:
    """Enclosures of the density's knots u_k, widths w_k and heights over its integral, e_k / A.

    A is a sum of weight_k e_k, so that weight_k e_k <= A, whatever the intervals lose of it.
    """

    spline: QuadraticSpline
    shares: SoftmaxBounds
    knots: list[Interval]
    w: list[Interval]
    e: list[Interval]
    rates: list[Interval]

    @classmethod
    def of(cls, spline: QuadraticSpline, theta: list[Interval]) -> _Density:
        """From the raw parameters."""
        n, floor = spline.bins, Interval.of(spline.floors[0])
        wide, tall = (
            1.0 / Interval.of(spline.temperatures[0]),
            1.0 / Interval.of(spline.temperatures[1]),
        )
        shares = SoftmaxBounds.of([raw * wide for raw in theta[:n]])
        free = 1.0 - floor * float(n)
        knots, w, e, rates = [], [], [], []
        for k, part in enumerate(shares.before):
            knots.append(part * free + floor * float(k))
        for part in shares.each:
            w.append(part * free + floor)
        for raw in theta[n:]:
            height = raw * tall
            e.append(softplus(height) + LEAST)
            rates.append(softplus_slope(height))
        if spline.tails:
            # the outer height is a mean of the others with weights of sum below one
            outer = weighted_sum(_outer_weights(w), e) / _inner_area(w)
            zero, one = torch.zeros_like(outer.lo), torch.ones_like(outer.hi)
            outer = outer.meet(hull_of(e) * Interval(zero, one))
            e = [outer, *e, outer]
        weights = _weights(w)
        area = weighted_sum(weights, e).meet(hull_of(e))
        heights = [_share_of(area, *pair) for pair in zip(e, weights, strict=True)]
        # softplus' <= softplus: a rate over the area is at most its height's
        if spline.tails:
            weights = weights[1:-1]
        rates = [_share_of(area, *pair) * tall for pair in zip(rates, weights, strict=True)]
        return cls(spline, shares, knots, w, heights, rates)

    @property
    def floor(self) -> float:
        """The least density."""
        return self.spline.floors[1]

    def mean(self, i: int) -> Interval:
        """The mean density in bin i."""
        return (self.e[i] + self.e[i + 1]) * 0.5


class _Bin:
    """The spline in bin k at xi."""

    def __init__(self, density: _Density, k: int, u: Interval) -> None:
        self.density, self.k = density, k
        left, right, width = density.e[k], density.e[k + 1], density.w[k]
        self.xi = position_in(u, density.knots[k], width)
        # the integral over the bin alone is at most one
        most = 2.0 / width
        density_at = (left * (1.0 - self.xi) + right * self.xi).meet(left.hull(right))
        self.p = density_at.minimum(Interval(most.hi, most.hi))
        total = width * self.xi * (left + self.p) * 0.5
        for i in range(k):
            total = total + density.mean(i) * density.w[i]
        self.share = clamped(total, 0.0, 1.0)
        free = 1.0 - Interval.of(density.floor)
        self.slope = self.p * free + density.floor
        self.value = u.maximum(0.0).minimum(1.0) * density.floor + self.share * free

    def sensitivities(self) -> list[Interval]:
        """df/dtheta, in units of y."""
        d, spline = self.density, self.density.spline
        by_height = [self._by_height(j) for j in range(len(d.e))]
        by_width = [self._by_width(j) for j in range(len(d.w))]
        if spline.tails:
            by_height, by_width = self._through_outer_height(by_height, by_width)
        size = Interval.of(spline.right) - spline.left
        scale = size * (1.0 - Interval.of(d.floor))
        free = (1.0 - Interval.of(spline.floors[0]) * float(spline.bins)) / spline.temperatures[0]
        # dw_i/draw_j = free p_i (1[i=j] - p_j): the derivative is that by w_j less a mean of all
        mean = weighted_sum(d.shares.each, by_width).meet(hull_of(by_width))
        result = []
        for part, p in zip(by_width, d.shares.each, strict=True):
            result.append((part - mean) * p * free * scale)
        for part, rate in zip(by_height, d.rates, strict=True):
            result.append(part * rate * scale)
        return result

    def _through_outer_height(
        self, by_height: list[Interval], by_width: list[Interval]
    ) -> tuple[list[Interval], list[Interval]]:
        """Derivatives by the inner heights and by the widths, on which the outer height depends."""
        d, outer = self.density, by_height[0] + by_height[-1]
        rest = _inner_area(d.w)
        heights, widths = [], []
        for part, weight in zip(by_height[1:-1], _outer_weights(d.w), strict=True):
            heights.append(part + outer * weight / rest)
        for part, rate in zip(by_width, _outer_by_widths(d.e[1:-1], d.e[0]), strict=True):
            widths.append(part + outer * rate / rest)
        return heights, widths

    def _by_height(self, j: int) -> Interval:
        """A d(G / A)/de_j = G_j - (G / A) A_j, A_j the area of the hat at knot j, G_j that to u."""
        d, k = self.density, self.k
        whole = _weights(d.w)[j]
        zero = Interval.of(torch.zeros_like(self.xi.lo))
        if j < k:
            until = whole
        elif j > k + 1:
            until = zero
        elif j == k + 1:
            until = d.w[k] * self.xi.square() * 0.5
        else:
            before = zero
            if j:
                before = d.w[j - 1] * 0.5
            until = before + d.w[k] * self.xi * (2.0 - self.xi) * 0.5
        # between nothing and all of the hat, whatever the enclosures above lost
        return until.maximum(0.0).minimum(whole) - self.share * whole

    def _by_width(self, i: int) -> Interval:
        """d(G / A)/dw_i at a fixed u."""
        d, k = self.density, self.k
        mean = d.mean(i)
        if i < k:
            moved = mean - self.p
        elif i == k:
            moved = (d.e[k] - d.e[k + 1]) * self.xi.square() * 0.5
        else:
            moved = Interval.of(torch.zeros_like(self.xi.lo))
        return moved - self.share * mean


def _share_of(area: Interval, part: Interval, weight: Interval) -> Interval:
    """part / area for weight * part <= area."""
    most = weight.reciprocal().hi
    return (part / area).meet(Interval(torch.zeros_like(most), most))


def _halves_of_neighbours(parts: list[Interval]) -> list[Interval]:
    return [(a + b) * 0.5 for a, b in itertools.pairwise(parts)]


def _weights(w: list[Interval]) -> list[Interval]:
    """The weights of the knots' heights in the area."""
    return [w[0] * 0.5, *_halves_of_neighbours(w), w[-1] * 0.5]


def _outer_weights(w: list[Interval]) -> list[Interval]:
    """Weights of the inner heights in the numerator of the outer height, as in nflows."""
    first, last = w[0] * 0.25, w[-1] * 0.25
    inner = w[1:-1]
    if not inner:
        return [first + last]
    return [first + inner[0] * 0.5, *_halves_of_neighbours(inner), last + inner[-1] * 0.5]


def _inner_area(w: list[Interval]) -> Interval:
    """The denominator of the outer height."""
    return 1.0 - (w[0] + w[-1]) * 0.25


def _outer_by_widths(e: list[Interval], outer: Interval) -> list[Interval]:
    """The derivatives of the outer height by the widths, times ``_inner_area``."""
    return [(e[0] + outer) * 0.25, *_halves_of_neighbours(e), (e[-1] + outer) * 0.25]
