"""Rational-quadratic spline couplings of one kept entry on small boxes.

The knots come from a table, and the spline is evaluated in affine forms.

With the knots q = (x_k, y_k, w_k, h_k, d_k, d_{k+1}) as functions of the kept entry u,

    df/du = y' + alpha h' + h (alpha_s s' + alpha_d0 d0' + alpha_d1 d1') - f_x (x_k' + xi w')

with s = h / w has six terms, where the sum over the network's raw outputs has one for every
parameter and loses what cancels in the softmax. A box that touches several bins takes the hull of
what each bin's formula, continued beyond the bin, gives.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.lipschitz.branch_and_bound.affine_forms import AffineForm
from inn_guard.lipschitz.branch_and_bound.coupling import CoupledEntries
from inn_guard.lipschitz.branch_and_bound.lookup_table import Table
from inn_guard.lipschitz.branch_and_bound.taylor import Jet, NetworkOnBoxes
from inn_guard.lipschitz.transformers.base import (
    ones,
    softplus,
    softplus_curvature,
    softplus_slope,
)
from inn_guard.lipschitz.transformers.rational_quadratic import RationalQuadraticSpline
from inn_guard.lipschitz.transformers.spline import SoftmaxBounds
from inn_guard.numerics.intervals import Interval

__all__ = ["SplineKnots", "SplineOnBoxes"]

TOUCHED = 3  #: bins to each side of the first that a box may touch
ROLES = 6  #: x, y, w, h and both d of a bin


@dataclass(frozen=True)
class _Curve:
    """A function of u: its value, its first and its second derivative."""

    value: Interval
    first: Interval
    second: Interval

    @classmethod
    def constant(cls, value: Interval) -> _Curve:
        return cls(value, value * 0.0, value * 0.0)

    def times(self, factor: Interval) -> _Curve:
        return _Curve(self.value * factor, self.first * factor, self.second * factor)

    def plus(self, shift: Interval) -> _Curve:
        return _Curve(self.value + shift, self.first, self.second)


class SplineKnots:
    """A spline's knots as functions of the network's input: x, y, w, h, d_k and d_{k+1} by bin.

    Args:
        network: gives the raw parameters.
        spline: what they mean.
        rows: for every parameter the outputs that hold it, one for each changed entry.
    """

    def __init__(
        self, network: NetworkOnBoxes, spline: RationalQuadraticSpline, rows: Sequence[Tensor]
    ) -> None:
        self.network, self.spline, self.rows = network, spline, rows

    def jet(self, x: Interval) -> Jet:
        """All knots, (B, 6 bins e): the six of a bin, then bin by bin, then entry by entry."""
        raw = self.network.jet(x)
        if raw.second_derivative is None:
            raise ValueError("expected a network of one input, got one of several")
        zero = Interval.of(torch.zeros_like(raw.centre.lo))
        at = self._knots(_Curve(raw.centre, raw.rate[:, 0], zero))
        over = self._knots(_Curve(raw.value, raw.slope[:, 0], raw.second_derivative[:, 0]))
        return Jet(
            at.value,
            over.value,
            at.first.map(_with_input),
            over.first.map(_with_input),
            over.second.map(_with_input),
        )

    def _knots(self, raw: _Curve) -> _Curve:
        u, n, spline = [], self.spline.bins, self.spline
        for index in self.rows:
            u.append(_Curve(raw.value[:, index], raw.first[:, index], raw.second[:, index]))
        x, w = self._laid_out(u[:n], spline.floors[0])
        y, h = self._laid_out(u[n : 2 * n], spline.floors[1])
        d = [_softplus(part, spline.floors[2]) for part in u[2 * n :]]
        if spline.tails:
            end = _Curve.constant(ones(u[0].value))
            d = [end, *d, end]
        knots = []
        for k in range(n):
            knots += [x[k], y[k], w[k], h[k], d[k], d[k + 1]]
        return _Curve(
            _by_entry([knot.value for knot in knots]),
            _by_entry([knot.first for knot in knots]),
            _by_entry([knot.second for knot in knots]),
        )

    def _laid_out(self, raw: list[_Curve], floor: float) -> tuple[list[_Curve], list[_Curve]]:
        """Positions of the knots and lengths of the bins, along one axis."""
        spline = self.spline
        size, scale = Interval.of(spline.right) - spline.left, 1.0 / Interval.of(spline.temperature)
        shares, before = _softmax([part.times(scale) for part in raw])
        free = (1.0 - Interval.of(floor) * float(spline.bins)) * size
        least = Interval.of(floor) * size
        positions = []
        for k, p in enumerate(before):
            positions.append(p.times(free).plus(least * float(k) + spline.left))
        return positions, [p.times(free).plus(least) for p in shares]


def _with_input(t: Tensor) -> Tensor:
    """(B, n) -> (B, 1, n), the derivative by the one input."""
    return t[:, None]


def _by_entry(parts: list[Interval]) -> Interval:
    """Parts (B, e) -> (B, e * parts)."""
    lo = torch.stack([part.lo for part in parts], 2)
    hi = torch.stack([part.hi for part in parts], 2)
    return Interval(lo.flatten(1), hi.flatten(1))


def _softmax(u: list[_Curve]) -> tuple[list[_Curve], list[_Curve]]:
    """The softmax p_j with p' = p (u' - m), m = sum p u', and its sums before each bin."""
    softmax = SoftmaxBounds.of([part.value for part in u])
    mean = _sum([p * part.first for p, part in zip(softmax.each, u, strict=True)])
    away = [part.first - mean for part in u]
    # m' = sum p (u' - m)^2 + sum p u''
    terms = []
    for p, a, part in zip(softmax.each, away, u, strict=True):
        terms.append(p * (a.square() + part.second))
    mean_rate = _sum(terms)
    each = []
    for p, a, part in zip(softmax.each, away, u, strict=True):
        first = p * a
        each.append(_Curve(p, first, first * a + p * (part.second - mean_rate)))
    zero = softmax.before[0] * 0.0
    before = [_Curve(softmax.before[0], zero, zero)]
    for total, share in zip(softmax.before[1:], each, strict=True):
        last = before[-1]
        before.append(_Curve(total, last.first + share.first, last.second + share.second))
    # all shares together are one
    before[-1] = _Curve(softmax.before[-1], zero, zero)
    return each, before


def _softplus(u: _Curve, floor: float) -> _Curve:
    rate, bend = softplus_slope(u.value), softplus_curvature(u.value)
    value = softplus(u.value) + floor
    return _Curve(value, rate * u.first, bend * u.first.square() + rate * u.second)


def _sum(parts: list[Interval]) -> Interval:
    return functools.reduce(operator.add, parts)


class _Bin:
    """The spline in one bin at xi = (x - x_k) / w.

    Knots and their derivatives in u are rows of forms (6, B).
    f = y + h alpha, alpha = (s xi^2 + d0 xi eta) / D, D = s + (d0 + d1 - 2 s) xi eta, eta = 1 - xi.
    """

    def __init__(self, x: AffineForm, knots: AffineForm, rates: AffineForm) -> None:
        start, self.y, width, self.h, self.d0, self.d1 = (knots[k] for k in range(ROLES))
        self.rates = [rates[k] for k in range(ROLES)]
        self.narrow = width.reciprocal()
        self.s = self.h * self.narrow
        self.xi = (x - start) * self.narrow
        self.square = self.xi.square()
        self.product = self.xi - self.square
        self.other_square = self.square - self.xi * 2.0 + 1.0
        sharp = self.d0 + self.d1 - self.s * 2.0
        self.inverse = (self.s + sharp * self.product).reciprocal()
        self.alpha = (self.s * self.square + self.d0 * self.product) * self.inverse

    @property
    def value(self) -> AffineForm:
        return self.y + self.h * self.alpha

    def derivatives(self) -> tuple[AffineForm, AffineForm]:
        """f_x, and f_u at a fixed xi."""
        _, y_rate, width_rate, h_rate, d0_rate, d1_rate = self.rates
        s, d0, d1, xi = self.s, self.d0, self.d1, self.xi
        right, left = d1 * self.square, d0 * self.other_square
        inverse_square = self.inverse.square()
        slope = s.square() * inverse_square * (right + left + (s * self.product) * 2.0)
        eta, scale = 1.0 - xi, self.product * inverse_square
        by_slope = right - left
        by_first = eta * (s * eta + d1 * xi)
        by_last = xi * (s * xi + d0 * eta)
        s_rate = (h_rate - s * width_rate) * self.narrow
        bent = by_slope * s_rate + by_first * d0_rate - by_last * d1_rate
        own = y_rate + self.alpha * h_rate + self.h * (scale * bent)
        return slope, own

    @property
    def shift(self) -> AffineForm:
        """x_k' + xi w'."""
        return self.rates[0] + self.xi * self.rates[2]

    def everything(self) -> AffineForm:
        """z, dz/dx, one over dz/dx, dz/du, dz/du over dz/dx, as rows (5, B)."""
        slope, own = self.derivatives()
        flat = slope.reciprocal()
        return AffineForm.stack(
            [self.value, slope, flat, own - slope * self.shift, own * flat - self.shift]
        )


@dataclass(frozen=True)
class SplineOnBoxes:
    """A spline coupling of one kept entry, as CouplingOnBoxes.

    Attributes:
        spline: the transformer.
        table: of its knots, a group for every bin of every changed entry.
    """

    spline: RationalQuadraticSpline
    table: Table

    def __call__(self, kept: Interval, x: Interval) -> CoupledEntries:
        """Value and derivatives over boxes of the kept entry (B, 1) and the changed ones (B, e)."""
        count, entries = x.shape
        repeated = kept.map(lambda t: t.expand(count, entries).reshape(-1, 1))
        pairs = Interval.cat([repeated, x.map(lambda t: t.reshape(-1, 1))], 1)
        both = AffineForm.coordinates(pairs)
        first = torch.arange(entries).repeat(count) * self.spline.bins
        found = self._at(both[:, 0], both[:, 1], first)
        parts = [_apart(found[k], count, entries) for k in range(len(found.middle))]
        value, slope, inverse_slope, partials, log_partials = parts
        return CoupledEntries(
            value, slope, inverse_slope, partials[..., None], log_partials[..., None]
        )

    def _at(self, u: AffineForm, x: AffineForm, first: Tensor) -> AffineForm:
        """Rows (5, B), for the bin of the middle and for those that the box touches next to it."""
        start = self._bin(u.middle, x.middle, first)
        found, xi = self._in_bin(u, x, first + start)
        for step, beyond in ((-1, _left_of), (1, _right_of)):
            rows, at, position = torch.arange(len(start)), start, xi
            for trial in range(TOUCHED + 1):
                may_be, must_be = beyond(position)
                rows, at, only = rows[may_be], at[may_be] + step, must_be[may_be]
                out = (at < 0) | (at >= self.spline.bins)
                if self.spline.tails and bool(out.any()):
                    found = _joined(found, rows[out], _identity(x[rows[out]]), only=only[out])
                rows, at, only = rows[~out], at[~out], only[~out]
                if not len(rows):
                    break
                part, position = self._in_bin(u[rows], x[rows], first[rows] + at)
                if trial == TOUCHED:
                    part = part.widened(math.inf)
                found = _joined(found, rows, part, only=only)
        return found

    def _bin(self, u: Tensor, x: Tensor, first: Tensor) -> Tensor:
        """About where the middles lie: the search for touched bins begins there."""
        n, cell = self.spline.bins, self.table.nearest(u)
        points = self.table.points.reshape(len(self.table.middle), -1, 2 * ROLES)
        columns = first[:, None] + torch.arange(1, n)
        start, rate = points[cell[:, None], columns, 0], points[cell[:, None], columns, ROLES]
        return (start + rate * (u - self.table.middle[cell])[:, None] <= x[:, None]).sum(1)

    def _in_bin(self, u: AffineForm, x: AffineForm, group: Tensor) -> tuple[AffineForm, Interval]:
        inside = _Bin(x, *self.table(u, group))
        return inside.everything(), inside.xi.range


def _apart(form: AffineForm, count: int, entries: int) -> AffineForm:
    """(B e) in coordinates of u and of the entry's own x -> (B, e) in those of u and of every x."""
    own = form.slopes[1].reshape(count, entries)
    by_x = torch.diag_embed(own).movedim(1, 0)
    slopes = torch.cat([form.slopes[0].reshape(1, count, entries), by_x])
    middle, rest = form.middle.reshape(count, entries), form.rest.reshape(count, entries)
    return AffineForm(middle, slopes, rest)


def _left_of(xi: Interval) -> tuple[Tensor, Tensor]:
    """Whether a box may be left of a bin, and whether it is nowhere else."""
    return ~(xi.lo >= 0), xi.hi < 0


def _right_of(xi: Interval) -> tuple[Tensor, Tensor]:
    """Whether a box may be right of a bin, and whether it is nowhere else."""
    return ~(xi.hi <= 1), xi.lo > 1


def _joined(whole: AffineForm, rows: Tensor, part: AffineForm, *, only: Tensor) -> AffineForm:
    """Hulls of some rows with another part; the part itself where the box is only in there."""
    both = whole[:, rows].hull(part)
    return whole.replaced(rows, part.where(only, both))


def _identity(x: AffineForm) -> AffineForm:
    one, zero = x.constant(1.0), x.constant(0.0)
    return AffineForm.stack([x, one, one, zero, zero])
