"""Piecewise quadratic couplings: enclosures of a spline with a piecewise linear density, and of its derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from inn_guard.lipschitz.transformers.rational_quadratic import Hull, WorkSharing, position_in
from inn_guard.numerics.intervals import Interval

__all__ = ["QuadraticSpline"]

LEAST = 1e-3  #: that nflows adds to a height before it normalises them


@dataclass(frozen=True)
class QuadraticSpline:
    """f(u) = floor u + (1 - floor) G(u) / A, G the integral of a density p, linear between its knots, and A all of it.

    u is x moved to [0, 1]. The parameters are raw widths and heights: w = min_width + (1 - bins min_width)
    softmax(raw / temperature), e = softplus(raw / temperature of heights) + 1e-3 at the knots. With tails the outer
    heights are not free but both the same mean c of the others, and x is kept outside.

    Attributes:
        bins: number of bins.
        left: left end, in x and in y.
        right: right end.
        tails: whether x may lie outside.
        floors: least share of a width, least density.
        temperatures: raw widths, and raw heights, are divided by them.

    References:
        Neural Importance Sampling (Mueller, McWilliams, Rousselle, Gross, Novak, 2019).
    """

    bins: int
    left: float
    right: float
    tails: bool = True
    floors: tuple[float, float] = (1e-3, 1e-3)
    temperatures: tuple[float, float] = (1.0, 1.0)

    @property
    def count(self) -> int:
        """Parameters per entry."""
        return 2 * self.bins - 1 if self.tails else 2 * self.bins + 1

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """f, moved back."""
        size = Interval.of(self.right) - self.left
        y = self._over_bins(x, theta, lambda b: [b.value * size + self.left], outside=None)[0]
        if not self.tails:
            return y
        inside = Interval(torch.full_like(x.lo, self.left), torch.full_like(x.hi, self.right))
        return y.meet(Interval(torch.minimum(x.lo, inside.lo), torch.maximum(x.hi, inside.hi)))

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """f' = floor + (1 - floor) p / A."""
        return self._over_bins(x, theta, lambda b: [b.slope], outside=1.0)[0]

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """df/dtheta."""
        return self._over_bins(x, theta, lambda b: b.sensitivities(), outside=0.0)

    def relative(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """df/dtheta / f'."""
        return self._over_bins(
            x, theta, lambda b: [part / b.slope for part in b.sensitivities()], outside=0.0
        )

    def _over_bins(
        self,
        x: Interval,
        theta: list[Interval],
        inside: Callable[[_Bin], list[Interval]],
        outside: float | None,
    ) -> list[Interval]:
        density = _Density.of(self, theta)
        u = (x - self.left) / (Interval.of(self.right) - self.left)
        parts = Hull(x, self.left, self.right, outside if self.tails else float("nan"))
        for k in range(self.bins):
            touched = (u.lo <= density.knots[k + 1].hi) & (u.hi >= density.knots[k].lo)
            parts.add(touched, inside(_Bin(density, k, u)))
        return parts.result()


@dataclass(frozen=True)
class _Density:
    """Enclosures of the density's knots u_k, widths w_k, heights e_k, and of all under it, A."""

    spline: QuadraticSpline
    shares: WorkSharing
    knots: list[Interval]
    w: list[Interval]
    e: list[Interval]
    area: Interval
    rates: list[Interval]

    @classmethod
    def of(cls, spline: QuadraticSpline, theta: list[Interval]) -> _Density:
        """From the raw parameters."""
        n, floor = spline.bins, Interval.of(spline.floors[0])
        wide, tall = (1.0 / Interval.of(t) for t in spline.temperatures)
        shares = WorkSharing.of([raw * wide for raw in theta[:n]])
        free = 1.0 - floor * float(n)
        knots = [part * free + floor * float(k) for k, part in enumerate(shares.before)]
        w = [part * free + floor for part in shares.each]
        heights = [raw * tall for raw in theta[n:]]
        e = [raw.increasing(functional.softplus) + LEAST for raw in heights]
        if spline.tails:
            outer = _weighted(_outer_weights(w), e) / _rest(w)
            outer = outer.meet(
                _hull(e) * Interval(torch.zeros_like(outer.lo), torch.ones_like(outer.hi))
            )
            e = [outer, *e, outer]
        area = _weighted(_weights(w), e).meet(_hull(e))
        return cls(
            spline,
            shares,
            knots,
            w,
            e,
            area,
            [raw.increasing(torch.sigmoid) * tall for raw in heights],
        )

    @property
    def floor(self) -> float:
        """The least density."""
        return self.spline.floors[1]


class _Bin:
    """The spline in bin k at xi."""

    def __init__(self, density: _Density, k: int, u: Interval) -> None:
        self.density, self.k = density, k
        d = density
        self.xi = position_in(u, d.knots[k], d.w[k])
        self.p = d.e[k] * (1.0 - self.xi) + d.e[k + 1] * self.xi
        self.p = self.p.meet(d.e[k].hull(d.e[k + 1]))
        before = [_mean(d, i) * d.w[i] for i in range(k)]
        own = d.w[k] * self.xi * (d.e[k] + self.p) * 0.5
        total = own
        for part in before:
            total = total + part
        share = total / d.area
        self.share = Interval(share.lo.clamp(0, 1), share.hi.clamp(0, 1))
        free = 1.0 - Interval.of(d.floor)
        self.slope = self.p / d.area * free + d.floor
        self.value = u.maximum(0.0).minimum(1.0) * d.floor + self.share * free

    def sensitivities(self) -> list[Interval]:
        """df/dtheta, in units of y."""
        d, size = self.density, Interval.of(self.density.spline.right) - self.density.spline.left
        scale = size * (1.0 - Interval.of(d.floor)) / d.area
        by_height = [self._by_height(j) for j in range(len(d.e))]
        by_width = [self._by_width(j) for j in range(len(d.w))]
        if d.spline.tails:
            outer = by_height[0] + by_height[-1]
            inner, weights = d.e[1:-1], _outer_weights(d.w)
            rest = _rest(d.w)
            by_height = [
                part + outer * weight / rest
                for part, weight in zip(by_height[1:-1], weights, strict=True)
            ]
            moved = _outer_by_widths(inner, d.e[0])
            by_width = [part + outer * m / rest for part, m in zip(by_width, moved, strict=True)]
        free = (
            1.0 - Interval.of(d.spline.floors[0]) * float(d.spline.bins)
        ) / d.spline.temperatures[0]
        # dw_i/draw_j = free p_i (1[i=j] - p_j): the derivative is that by w_j less a mean of all
        mean = _weighted(d.shares.each, by_width).meet(_hull(by_width))
        raw_widths = [
            (part - mean) * p * free * scale
            for part, p in zip(by_width, d.shares.each, strict=True)
        ]
        return raw_widths + [
            part * rate * scale for part, rate in zip(by_height, d.rates, strict=True)
        ]

    def _by_height(self, j: int) -> Interval:
        """A d(G / A)/de_j = G_j - (G / A) A_j, G_j the integral to u of the hat at knot j and A_j all of it."""
        d, k = self.density, self.k
        whole = _weights(d.w)[j]
        zero = Interval.of(torch.zeros_like(self.xi.lo))
        if j < k:
            until = whole
        elif j > k + 1:
            until = zero
        elif j == k:
            left = d.w[j - 1] * 0.5 if j else zero
            until = left + d.w[k] * self.xi * (2.0 - self.xi) * 0.5
        else:
            until = d.w[k] * self.xi.square() * 0.5
        # between nothing and all of the hat, whatever the enclosures above lost
        return until.maximum(0.0).minimum(whole) - self.share * whole

    def _by_width(self, i: int) -> Interval:
        """A d(G / A)/dw_i at a fixed u."""
        d, k = self.density, self.k
        mean = _mean(d, i)
        if i < k:
            moved = mean - self.p
        elif i == k:
            moved = (d.e[k] - d.e[k + 1]) * self.xi.square() * 0.5
        else:
            moved = Interval.of(torch.zeros_like(self.xi.lo))
        return moved - self.share * mean


def _mean(d: _Density, i: int) -> Interval:
    return (d.e[i] + d.e[i + 1]) * 0.5


def _weights(w: list[Interval]) -> list[Interval]:
    """What each of the knots' heights weighs in the area."""
    return [w[0] * 0.5, *((a + b) * 0.5 for a, b in itertools.pairwise(w)), w[-1] * 0.5]


def _outer_weights(w: list[Interval]) -> list[Interval]:
    """What the inner heights weigh in the numerator of the outer height, as nflows computes it."""
    ends = [w[0] * 0.25, w[-1] * 0.25]
    inner = w[1:-1]
    if not inner:
        return [ends[0] + ends[1]]
    between = [(a + b) * 0.5 for a, b in itertools.pairwise(inner)]
    return [ends[0] + inner[0] * 0.5, *between, ends[1] + inner[-1] * 0.5]


def _rest(w: list[Interval]) -> Interval:
    return 1.0 - (w[0] + w[-1]) * 0.25


def _outer_by_widths(e: list[Interval], outer: Interval) -> list[Interval]:
    """The derivatives of the outer height by the widths, times ``_rest``."""
    between = [(a + b) * 0.5 for a, b in itertools.pairwise(e)]
    return [(e[0] + outer) * 0.25, *between, (e[-1] + outer) * 0.25]


def _weighted(weights: list[Interval], parts: list[Interval]) -> Interval:
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total + weight * part
    return total


def _hull(parts: list[Interval]) -> Interval:
    lo, hi = parts[0].lo, parts[0].hi
    for part in parts[1:]:
        lo, hi = torch.minimum(lo, part.lo), torch.maximum(hi, part.hi)
    return Interval(lo, hi)
