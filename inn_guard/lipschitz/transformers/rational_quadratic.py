"""Spline couplings: enclosures of a monotone spline and of its derivatives in x and in the network's raw parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.numerics.intervals import Interval

__all__ = [
    "Hull",
    "LinearSpline",
    "RationalQuadraticSpline",
    "SplineBin",
    "WorkSharing",
    "position_in",
]


@dataclass(frozen=True)
class WorkSharing:
    """A softmax's entries p_j and their sums C_k before bin k, each enclosed on its own.

    Attributes:
        each: p_j.
        before: C_k = sum_{j<k} p_j for k = 0..bins.
    """

    each: list[Interval]
    before: list[Interval]

    @classmethod
    def of(cls, raw: list[Interval]) -> WorkSharing:
        """From the softmax's inputs. C_k rises with the inputs before k and falls with those after."""
        top = raw[0].hi
        for u in raw[1:]:
            top = torch.maximum(top, u.hi)
        weights = [(u - top).exp() for u in raw]
        zero = Interval.of(torch.zeros_like(top))
        partial, rest = [zero], [zero]
        for w, v in zip(weights, reversed(weights), strict=True):
            partial.append(partial[-1] + w)
            rest.append(rest[-1] + v)
        before = [cls._share(partial[k], rest[len(raw) - k]) for k in range(len(raw) + 1)]
        each = []
        for k, w in enumerate(weights):
            others = partial[k] + rest[len(raw) - k - 1]
            each.append(cls._share(w, others))
        return cls(each, before)

    @staticmethod
    def _share(part: Interval, others: Interval) -> Interval:
        """part / (part + others), rising in the one and falling in the other."""
        low = Interval(part.lo, part.lo) / (
            Interval(part.lo, part.lo) + Interval(others.hi, others.hi)
        )
        high = Interval(part.hi, part.hi) / (
            Interval(part.hi, part.hi) + Interval(others.lo, others.lo)
        )
        lo = torch.where(part.lo <= 0, 0.0, low.lo).clamp(0, 1)
        hi = torch.where(others.lo <= 0, 1.0, high.hi).clamp(0, 1)
        return Interval(lo, torch.where(part.hi <= 0, hi.clamp_max(1e-300), hi))

    def moves(self, j: int, k: int, xi: Interval) -> Interval:
        """d/du_j of C_k + xi p_k: p_j (1[j<k] - C_k) + xi p_k (1[j=k] - p_j)."""
        start = (1.0 - self.before[k]) if j < k else -self.before[k]
        inner = (1.0 - self.each[k]) if j == k else -self.each[j]
        return self.each[j] * start + xi * self.each[k] * inner

    def width_moves(self, j: int, k: int) -> Interval:
        """d/du_j of p_k."""
        return self.each[k] * ((1.0 - self.each[k]) if j == k else -self.each[j])

    def start_moves(self, j: int, k: int) -> Interval:
        """d/du_j of C_k."""
        return self.each[j] * ((1.0 - self.before[k]) if j < k else -self.before[k])


Bin = tuple[Interval, list[Interval]]


@dataclass(frozen=True)
class LinearSpline:
    """A softmax's cumulative sums at equal knots, straight in between; the identity outside [left, right] if tails.

    Attributes:
        bins: number of bins, and of parameters.
        left: left end.
        right: right end.
        tails: whether x may lie outside.
    """

    bins: int
    left: float
    right: float
    tails: bool = True

    @property
    def count(self) -> int:
        """Parameters per entry."""
        return self.bins

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """left + (right - left) (C_k + xi p_k)."""
        shares, size = WorkSharing.of(theta), self.right - self.left
        return self._over_bins(
            x, lambda k, xi: [(shares.before[k] + xi * shares.each[k]) * size + self.left]
        )[0]

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """bins p_k."""
        shares = WorkSharing.of(theta)
        return self._over_bins(x, lambda k, xi: [shares.each[k] * float(self.bins)], outside=1.0)[0]

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """(right - left) d(C_k + xi p_k)."""
        shares, size = WorkSharing.of(theta), self.right - self.left
        bins = range(self.bins)
        return self._over_bins(
            x, lambda k, xi: [shares.moves(j, k, xi) * size for j in bins], outside=0.0
        )

    def relative(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """Divided by bins p_k, bin by bin."""
        shares, size = WorkSharing.of(theta), self.right - self.left

        def inside(k: int, xi: Interval) -> list[Interval]:
            return [
                shares.moves(j, k, xi) * size / (shares.each[k] * float(self.bins))
                for j in range(self.bins)
            ]

        return self._over_bins(x, inside, outside=0.0)

    def _over_bins(
        self,
        x: Interval,
        inside: Callable[[int, Interval], list[Interval]],
        outside: float | None = None,
    ) -> list[Interval]:
        """The hull over the bins that x may touch; outside of them a constant, or x itself."""
        width = Interval.of(self.right - self.left) / float(self.bins)
        parts = Hull(x, self.left, self.right, outside if self.tails else math.nan)
        for k in range(self.bins):
            knots = (width * float(k) + self.left, width * float(k + 1) + self.left)
            touched = (x.lo <= knots[1].hi) & (x.hi >= knots[0].lo)
            xi = position_in(x, knots[0], width)
            parts.add(touched, inside(k, xi))
        return parts.result()


class Hull:
    """Hulls of several quantities over the bins that an interval touches."""

    def __init__(self, x: Interval, left: float, right: float, outside: float | None) -> None:
        self.x, self.left, self.right, self.outside = x, left, right, outside
        self.lo: list[Tensor] = []
        self.hi: list[Tensor] = []

    def add(self, touched: Tensor, parts: list[Interval]) -> None:
        """Another bin's."""
        if not self.lo:
            self.lo = [torch.full_like(self.x.lo, math.inf) for _ in parts]
            self.hi = [torch.full_like(self.x.lo, -math.inf) for _ in parts]
        for n, part in enumerate(parts):
            self.lo[n] = torch.where(touched, torch.minimum(self.lo[n], part.lo), self.lo[n])
            self.hi[n] = torch.where(touched, torch.maximum(self.hi[n], part.hi), self.hi[n])

    def result(self) -> list[Interval]:
        """With what lies outside of all bins: x itself (None), a constant, or nothing (NaN)."""
        out = (self.x.lo < self.left) | (self.x.hi > self.right)
        if self.outside is not None and math.isnan(self.outside):
            return [Interval(lo, hi) for lo, hi in zip(self.lo, self.hi, strict=True)]
        low = self.x.lo if self.outside is None else torch.full_like(self.x.lo, self.outside)
        high = self.x.hi if self.outside is None else torch.full_like(self.x.hi, self.outside)
        return [
            Interval(
                torch.where(out, torch.minimum(lo, low), lo),
                torch.where(out, torch.maximum(hi, high), hi),
            )
            for lo, hi in zip(self.lo, self.hi, strict=True)
        ]


def position_in(x: Interval, start: Interval, width: Interval) -> Interval:
    """(x - start) / width within [0, 1]: rising in x, falling in start; for points of the bin."""
    at = (x - start) / width
    return Interval(at.lo.clamp(0, 1), at.hi.clamp(0, 1))


@dataclass(frozen=True)
class RationalQuadraticSpline:
    """Monotone rational-quadratic spline; parameters are raw widths, heights and inner (or all) derivatives.

    widths = (right - left) (min_width + (1 - bins min_width) softmax(raw / temperature)), heights alike,
    derivatives = min_derivative + softplus(raw). With tails the outer derivatives are 1 and x is kept outside.

    Attributes:
        bins: number of bins.
        left: left end, in x and in y.
        right: right end.
        tails: whether x may lie outside.
        floors: least share of a width, least share of a height, least derivative.
        temperature: raw widths and heights are divided by it.

    References:
        Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019).
    """

    bins: int
    left: float
    right: float
    tails: bool = True
    floors: tuple[float, float, float] = (1e-3, 1e-3, 1e-3)
    temperature: float = 1.0

    @property
    def count(self) -> int:
        """Parameters per entry."""
        return 3 * self.bins - 1 if self.tails else 3 * self.bins + 1

    def derivative(self, raw: Interval) -> Interval:
        """At a knot."""
        return raw.increasing(torch.nn.functional.softplus) + self.floors[2]

    def derivative_rate(self, raw: Interval) -> Interval:
        """d derivative / d raw."""
        return raw.increasing(torch.sigmoid)

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """y_k + h_k alpha."""
        knots = _Knots.of(self, theta)
        y = self._over_bins(x, knots, lambda b: [b.y + b.h * b.alpha], outside=None)[0]
        if not self.tails:
            return y
        inside = Interval(torch.full_like(x.lo, self.left), torch.full_like(x.hi, self.right))
        return y.meet(Interval(torch.minimum(x.lo, inside.lo), torch.maximum(x.hi, inside.hi)))

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """f'."""
        return self._over_bins(x, _Knots.of(self, theta), lambda b: [b.slope], outside=1.0)[0]

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """df/dtheta."""
        return self._over_bins(
            x,
            _Knots.of(self, theta),
            lambda b: b.sensitivities(Interval.of(1.0), b.slope),
            outside=0.0,
        )

    def relative(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """df/dtheta / f', the derivative in the knots' x being exactly minus one."""

        def inside(b: _InBin) -> list[Interval]:
            return b.sensitivities(b.slope.reciprocal(), Interval.of(1.0))

        return self._over_bins(x, _Knots.of(self, theta), inside, outside=0.0)

    def _over_bins(
        self,
        x: Interval,
        knots: _Knots,
        inside: Callable[[_InBin], list[Interval]],
        outside: float | None,
    ) -> list[Interval]:
        parts = Hull(x, self.left, self.right, outside if self.tails else math.nan)
        for k in range(self.bins):
            touched = (x.lo <= knots.x[k + 1].hi) & (x.hi >= knots.x[k].lo)
            parts.add(touched, inside(_InBin(self, knots, k, x)))
        return parts.result()


@dataclass(frozen=True)
class _Knots:
    """Enclosures of a spline's knots: positions, widths, heights, derivatives, and what they are made of."""

    widths: WorkSharing
    heights: WorkSharing
    x: list[Interval]
    y: list[Interval]
    w: list[Interval]
    h: list[Interval]
    d: list[Interval]
    d_rates: list[Interval]

    @classmethod
    def of(cls, spline: RationalQuadraticSpline, theta: list[Interval]) -> _Knots:
        """From the raw parameters."""
        n, size = spline.bins, spline.right - spline.left
        scale = 1.0 / Interval.of(spline.temperature)
        shares = [WorkSharing.of([u * scale for u in theta[a : a + n]]) for a in (0, n)]
        positions, lengths = [], []
        for part, floor in zip(shares, spline.floors[:2], strict=True):
            free = 1.0 - Interval.of(floor) * float(n)
            positions.append(
                [
                    (p * free + Interval.of(floor) * float(k)) * size + spline.left
                    for k, p in enumerate(part.before)
                ]
            )
            lengths.append([(p * free + floor) * size for p in part.each])
        one = Interval.of(torch.ones_like(theta[0].lo))
        inner = [spline.derivative(u) for u in theta[2 * n :]]
        rates = [spline.derivative_rate(u) for u in theta[2 * n :]]
        d = [one, *inner, one] if spline.tails else inner
        return cls(
            shares[0], shares[1], positions[0], positions[1], lengths[0], lengths[1], d, rates
        )


class SplineBin:
    """The spline in one bin at xi: alpha = N / D, N = s xi^2 + d0 xi eta, D = s (1 - 2 xi eta) + (d0 + d1) xi eta.

    Args:
        x: where.
        start: of the bin.
        w: its width.
        y: the value at its start.
        h: its height.
        ends: the derivatives at both ends.
    """

    def __init__(
        self,
        x: Interval,
        start: Interval,
        w: Interval,
        y: Interval,
        h: Interval,
        ends: tuple[Interval, Interval],
    ) -> None:
        self.xi = xi = position_in(x, start, w)
        self.eta = 1.0 - xi
        self.y, self.h, self.w = y, h, w
        self.d0, self.d1, self.s = *ends, h / w
        outer = [Interval(e, e) * (1.0 - Interval(e, e)) for e in (xi.lo, xi.hi)]
        top = (xi.lo <= 0.5) & (xi.hi >= 0.5)
        product = outer[0].hull(outer[1])
        self.xe = Interval(
            product.lo.clamp_min(0), torch.where(top, product.hi.clamp_min(0.25), product.hi)
        )
        self.D = self.s * (1.0 - self.xe * 2.0) + (self.d0 + self.d1) * self.xe
        alpha = (self.s * xi.square() + self.d0 * self.xe) / self.D
        self.alpha = Interval(alpha.lo.clamp(0, 1), alpha.hi.clamp(0, 1))

    @functools.cached_property
    def inverse_square(self) -> Interval:
        """1 / D^2."""
        return self.D.square().reciprocal()

    @functools.cached_property
    def slope(self) -> Interval:
        """s^2 (d1 xi^2 + 2 s xi eta + d0 eta^2) / D^2, within its bounds by convexity."""
        mean = self.d1 * self.xi.square() + self.s * self.xe * 2.0 + self.d0 * self.eta.square()
        natural = self.s.square() * mean * self.inverse_square
        least = torch.minimum(torch.minimum(self.d0.lo, self.d1.lo), self.s.lo)
        # D <= max(s, s/2 + (d0 + d1)/4), and f' <= max(d0, d1, 2 s)
        widest = self.s.maximum(self.s * 0.5 + (self.d0 + self.d1) * 0.25)
        low = (
            Interval(self.s.lo, self.s.lo).square()
            * Interval(least, least)
            / Interval(widest.hi, widest.hi).square()
        )
        high = torch.maximum(torch.maximum(self.d0.hi, self.d1.hi), 2 * self.s.hi)
        return Interval(
            torch.maximum(natural.lo, low.lo), torch.minimum(natural.hi, high * (1 + 1e-15))
        )


class _InBin(SplineBin):
    """A bin of a spline whose knots are known as functions of the network's raw outputs."""

    def __init__(self, spline: RationalQuadraticSpline, knots: _Knots, k: int, x: Interval) -> None:
        self.spline, self.knots, self.k = spline, knots, k
        super().__init__(
            x, knots.x[k], knots.w[k], knots.y[k], knots.h[k], (knots.d[k], knots.d[k + 1])
        )

    def sensitivities(self, unit: Interval, slope: Interval) -> list[Interval]:
        """df/dtheta times ``unit``; ``slope`` is f' times ``unit``, which is known better than the product."""
        n, size, k = self.spline.bins, self.spline.right - self.spline.left, self.k
        scale = Interval.of(size) / self.spline.temperature
        free = [scale * (1.0 - Interval.of(floor) * float(n)) for floor in self.spline.floors[:2]]
        bend = (
            self.xe
            * (self.d1 * self.xi.square() - self.d0 * self.eta.square())
            * self.inverse_square
        )
        narrower = self.s.square() * bend * unit
        taller = self.s * bend
        widths, heights = self.knots.widths, self.knots.heights
        by_width = [
            -(slope * widths.moves(j, k, self.xi) + narrower * widths.width_moves(j, k)) * free[0]
            for j in range(n)
        ]
        by_height = [
            (heights.moves(j, k, self.alpha) + taller * heights.width_moves(j, k)) * unit * free[1]
            for j in range(n)
        ]
        return by_width + by_height + self._by_derivative(unit)

    def _by_derivative(self, unit: Interval) -> list[Interval]:
        left = (
            self.h
            * self.xe
            * self.eta
            * (self.s * self.eta + self.d1 * self.xi)
            * self.inverse_square
            * unit
        )
        right = -(
            self.h
            * self.xe
            * self.xi
            * (self.s * self.xi + self.d0 * self.eta)
            * self.inverse_square
            * unit
        )
        zero = Interval.of(torch.zeros_like(self.xi.lo))
        rates = self.knots.d_rates
        result = [zero for _ in rates]
        first = self.k - 1 if self.spline.tails else self.k
        for index, part in ((first, left), (first + 1, right)):
            if 0 <= index < len(rates):
                result[index] = part * rates[index]
        return result
