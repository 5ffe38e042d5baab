"""Rational-quadratic spline couplings of one kept entry on small boxes: knots by a table, the spline in affine forms.

With the knots q = (x_k, y_k, w_k, h_k, d_k, d_{k+1}) as functions of the kept entry u,

    df/du = y' + alpha h' + h (alpha_s s' + alpha_d0 d0' + alpha_d1 d1') - f_x (x_k' + xi w'),   s = h / w

has six terms, where the sum over the network's raw outputs has one for every parameter and loses what cancels in the
softmax. A box that touches several bins takes the hull of what each bin's formula, continued beyond the bin, gives.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from inn_guard.lipschitz.branch_and_bound.affine_forms import AffineForm
from inn_guard.lipschitz.branch_and_bound.coupling import Local
from inn_guard.lipschitz.branch_and_bound.lookup_table import Table
from inn_guard.lipschitz.branch_and_bound.taylor import Direct, Jet
from inn_guard.lipschitz.transformers.rational_quadratic import RationalQuadraticSpline, WorkSharing
from inn_guard.numerics.intervals import Interval

__all__ = ["KnotJets", "SplineOnBoxes"]

TOUCHED = 3  #: bins to each side of the first that a box may touch
ROLES = 6  #: x, y, w, h and both d of a bin


@dataclass(frozen=True)
class _Curve:
    """A function of u: its value, its derivative and, where it is asked for, its second derivative."""

    value: Interval
    first: Interval
    second: Interval

    def times(self, factor: Interval) -> _Curve:
        return _Curve(self.value * factor, self.first * factor, self.second * factor)

    def plus(self, shift: Interval) -> _Curve:
        return _Curve(self.value + shift, self.first, self.second)


class KnotJets:
    """A spline's knots as jets of the network's one input: x, y, w, h, d_k and d_{k+1} of every bin of every entry.

    Args:
        direct: the network.
        spline: what its outputs mean.
        rows: for every parameter the outputs that hold it, one for each changed entry.
    """

    def __init__(
        self, direct: Direct, spline: RationalQuadraticSpline, rows: Sequence[Tensor]
    ) -> None:
        self.direct, self.spline, self.rows = direct, spline, rows

    def jet(self, x: Interval) -> Jet:
        """All knots, (B, 6 bins e): the six of a bin side by side, then bin by bin, then entry by entry."""
        raw = self.direct.jet(x)
        if raw.second_derivative is None:
            raise ValueError("expected a network of one input")
        zero = Interval.of(torch.zeros_like(raw.centre.lo))
        at = self._knots(raw.centre, raw.rate[:, 0], zero)
        over = self._knots(raw.value, raw.slope[:, 0], raw.second_derivative[:, 0])
        rate, slope, bend = (
            part.map(lambda t: t[:, None]) for part in (at.first, over.first, over.second)
        )
        return Jet(at.value, over.value, rate, slope, bend)

    def _knots(self, value: Interval, first: Interval, second: Interval) -> _Curve:
        u = [_Curve(value[:, index], first[:, index], second[:, index]) for index in self.rows]
        n, spline = self.spline.bins, self.spline
        size = Interval.of(spline.right) - spline.left
        positions, lengths = [], []
        for start, floor in zip((0, n), spline.floors[:2], strict=True):
            scale = 1.0 / Interval.of(spline.temperature)
            each, before = _softmax([part.times(scale) for part in u[start : start + n]])
            free, least = (1.0 - Interval.of(floor) * float(n)) * size, Interval.of(floor) * size
            positions.append(
                [p.times(free).plus(least * float(k) + spline.left) for k, p in enumerate(before)]
            )
            lengths.append([p.times(free).plus(least) for p in each])
        inner = [_softplus(part, spline.floors[2]) for part in u[2 * n :]]
        one = Interval.of(torch.ones_like(value[:, self.rows[0]].lo))
        end = _Curve(one, one * 0.0, one * 0.0)
        d = [end, *inner, end] if spline.tails else inner
        bins = zip(positions[0][:n], positions[1][:n], *lengths, d[:-1], d[1:], strict=True)
        every = [part for one_bin in bins for part in one_bin]
        return _Curve(
            *(_by_entry([getattr(c, name) for c in every]) for name in ("value", "first", "second"))
        )


def _by_entry(parts: list[Interval]) -> Interval:
    """Parts (B, e) -> (B, e * parts)."""
    return Interval(
        *(torch.stack([getattr(p, end) for p in parts], 2).flatten(1) for end in ("lo", "hi"))
    )


def _softmax(u: list[_Curve]) -> tuple[list[_Curve], list[_Curve]]:
    """WorkSharing p_j, p' = p (u' - m) with m = sum p u', and their sums before each bin."""
    shares = WorkSharing.of([part.value for part in u])
    mean = _sum([p * part.first for p, part in zip(shares.each, u, strict=True)])
    away = [part.first - mean for part in u]
    first = [p * part for p, part in zip(shares.each, away, strict=True)]
    # m' = sum p (u' - m)^2 + sum p u''
    spread = _sum(
        [p * (a.square() + part.second) for p, a, part in zip(shares.each, away, u, strict=True)]
    )
    second = [
        f * a + p * (part.second - spread)
        for f, a, p, part in zip(first, away, shares.each, u, strict=True)
    ]
    each = [_Curve(*parts) for parts in zip(shares.each, first, second, strict=True)]
    zero = shares.before[0] * 0.0
    before = [_Curve(shares.before[0], zero, zero)]
    for k, p in enumerate(each):
        last = before[-1]
        before.append(_Curve(shares.before[k + 1], last.first + p.first, last.second + p.second))
    before[-1] = _Curve(shares.before[-1], zero, zero)  # all shares together are one
    return each, before


def _softplus(u: _Curve, floor: float) -> _Curve:
    rate, rest = u.value.increasing(torch.sigmoid), (-u.value).increasing(torch.sigmoid)
    value = u.value.increasing(functional.softplus) + floor
    return _Curve(value, rate * u.first, rate * rest * u.first.square() + rate * u.second)


def _sum(parts: list[Interval]) -> Interval:
    return functools.reduce(operator.add, parts)


class _Bin:
    """The spline in one bin at xi = (x - x_k) / w, knots and their derivatives in u being rows of forms (6, B).

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
        right, left, inverse_square = (
            d1 * self.square,
            d0 * self.other_square,
            self.inverse.square(),
        )
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
    """A spline coupling of one kept entry.

    Attributes:
        spline: which one.
        table: of its knots, a group for every bin of every changed entry.
    """

    spline: RationalQuadraticSpline
    table: Table

    def __call__(self, kept: Interval, x: Interval) -> Local:
        """Value and derivatives over boxes of the kept entry (B, 1) and the changed ones (B, e)."""
        count, entries = x.shape
        pairs = Interval.cat(
            [kept.map(lambda t: t.expand(count, entries).reshape(-1, 1)), x.map(_flat)], 1
        )
        both = AffineForm.coordinates(pairs)
        found = self._at(
            both[:, 0], both[:, 1], torch.arange(entries).repeat(count) * self.spline.bins
        )
        value, slope, flat, moves, relative = (
            _apart(found[k], count, entries) for k in range(len(found.middle))
        )
        return Local(value, slope, flat, moves[..., None], relative[..., None])

    def _at(self, u: AffineForm, x: AffineForm, first: Tensor) -> AffineForm:
        """Rows (5, B), for the bin of the middle and for those that the box touches to its left and right."""
        b = self._bin(u.middle, x.middle, first)
        found, xi = self._in_bin(u, x, first + b)
        for step in (-1, 1):
            rows, at, position = torch.arange(len(b)), b, xi
            for trial in range(TOUCHED + 1):
                beyond, gone = _left_of(position) if step < 0 else _right_of(position)
                rows, at, gone = rows[beyond], at[beyond] + step, gone[beyond]
                out = (at < 0) | (at >= self.spline.bins)
                if self.spline.tails and bool(out.any()):
                    found = _joined(found, rows[out], _identity(x[rows[out]]), alone=gone[out])
                rows, at, gone = rows[~out], at[~out], gone[~out]
                if not len(rows):
                    break
                part, position = self._in_bin(u[rows], x[rows], first[rows] + at)
                found = _joined(
                    found, rows, part.widened(math.inf) if trial == TOUCHED else part, alone=gone
                )
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


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, 1)


def _apart(form: AffineForm, count: int, entries: int) -> AffineForm:
    """(B e) in coordinates of u and of the entry's own x -> (B, e) in those of u and of every x."""
    own = form.slopes[1].reshape(count, entries)
    by_x = torch.diag_embed(own).movedim(1, 0) if entries > 1 else own[None]
    slopes = torch.cat([form.slopes[0].reshape(1, count, entries), by_x])
    return AffineForm(
        form.middle.reshape(count, entries), slopes, form.rest.reshape(count, entries)
    )


def _left_of(xi: Interval) -> tuple[Tensor, Tensor]:
    """Whether a box may be left of a bin, and whether it is nowhere else."""
    return ~(xi.lo >= 0), xi.hi < 0


def _right_of(xi: Interval) -> tuple[Tensor, Tensor]:
    """The same on the right."""
    return ~(xi.hi <= 1), xi.lo > 1


def _joined(whole: AffineForm, rows: Tensor, part: AffineForm, *, alone: Tensor) -> AffineForm:
    """Some rows' hulls with another part; the part alone where the box was not in what was known so far."""
    both = whole[:, rows].hull(part)
    chosen = (torch.where(alone, a, b) for a, b in zip(part.tensors, both.tensors, strict=True))
    return whole.replaced(rows, AffineForm(*chosen))


def _identity(x: AffineForm) -> AffineForm:
    one, zero = (
        AffineForm(torch.full_like(x.middle, c), 0 * x.slopes, 0 * x.rest) for c in (1.0, 0.0)
    )
    return AffineForm.stack([x, one, one, zero, zero])
