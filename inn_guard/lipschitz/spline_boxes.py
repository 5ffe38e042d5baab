"""Rational-quadratic spline couplings of one kept entry on small boxes: knots by a table, the spline in closed form.

With the knots q = (x_k, y_k, w_k, h_k, d_k, d_{k+1}) as functions of the kept entry u,

    df/du = y' + alpha h' + h (alpha_s s' + alpha_d0 d0' + alpha_d1 d1') - f_x (x_k' + xi w'),   s = h / w

has six terms, where the sum over the network's raw outputs has one for every parameter and loses what cancels in the
softmax. The knots and their derivatives are enclosed to second order by a table over u.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from inn_guard.lipschitz.intervals import Interval
from inn_guard.lipschitz.jets import Direct, Jet
from inn_guard.lipschitz.spline_transformers import RationalQuadraticSpline, Shares, SplineBin

__all__ = ["KnotJets", "Local", "spline_local", "spline_value"]


class Local(NamedTuple):
    """z = h(x; theta(u)) over boxes of the changed x (B, e) and the kept u (B, k).

    Attributes:
        value: z, (B, e).
        slope: dz/dx, (B, e).
        moves: dz/du, (B, e, k).
        relative: dz/du over dz/dx, (B, e, k).
    """

    value: Interval
    slope: Interval
    moves: Interval
    relative: Interval


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
    """A spline's knots as jets of the network's one input: x, y and d at bins + 1 knots, w and h of the bins.

    Args:
        direct: the network.
        spline: what its outputs mean.
        rows: for every parameter the outputs that hold it, one for each changed entry.
    """

    def __init__(self, direct: Direct, spline: RationalQuadraticSpline, rows: Sequence[Tensor]) -> None:
        self.direct, self.spline, self.rows = direct, spline, rows

    def jet(self, x: Interval) -> Jet:
        """All knots, (B, (5 bins + 3) e), parameter by parameter."""
        raw = self.direct.jet(x)
        if raw.bend is None:
            raise ValueError("expected a network of one input")
        zero = Interval.of(torch.zeros_like(raw.centre.lo))
        at = self._knots(raw.centre, raw.rate[:, 0], zero)
        over = self._knots(raw.value, raw.slope[:, 0], raw.bend[:, 0])
        offset = Interval(-x.radius, x.radius)
        slope = over.first.meet(at.first + over.second * offset)
        value = over.value.meet(at.value + slope * offset)
        rate, slope, bend = (part.map(lambda t: t[:, None]) for part in (at.first, slope, over.second))
        return Jet(at.value, value, rate, slope, bend)

    def _knots(self, value: Interval, first: Interval, second: Interval) -> _Curve:
        u = [_Curve(value[:, index], first[:, index], second[:, index]) for index in self.rows]
        n, spline = self.spline.bins, self.spline
        size = spline.right - spline.left
        positions, lengths = [], []
        for start, floor in zip((0, n), spline.floors[:2], strict=True):
            scale = 1.0 / Interval.of(spline.temperature)
            each, before = _softmax([part.times(scale) for part in u[start : start + n]])
            free, least = (1.0 - Interval.of(floor) * float(n)) * size, Interval.of(floor) * size
            positions += [p.times(free).plus(least * float(k) + spline.left) for k, p in enumerate(before)]
            lengths += [p.times(free).plus(least) for p in each]
        inner = [_softplus(part, spline.floors[2]) for part in u[2 * n :]]
        one = Interval.of(torch.ones_like(value[:, self.rows[0]].lo))
        end = _Curve(one, one * 0.0, one * 0.0)
        every = positions + lengths + ([end, *inner, end] if spline.tails else inner)
        return _Curve(*(Interval.cat([getattr(c, name) for c in every], -1) for name in ("value", "first", "second")))


def _softmax(u: list[_Curve]) -> tuple[list[_Curve], list[_Curve]]:
    """Shares p_j, p' = p (u' - m) with m = sum p u', and their sums before each bin."""
    shares = Shares.of([part.value for part in u])
    mean = _sum([p * part.first for p, part in zip(shares.each, u, strict=True)])
    away = [part.first - mean for part in u]
    first = [p * part for p, part in zip(shares.each, away, strict=True)]
    # m' = sum p (u' - m)^2 + sum p u''
    spread = _sum([p * (a.square() + part.second) for p, a, part in zip(shares.each, away, u, strict=True)])
    second = [f * a + p * (part.second - spread) for f, a, p, part in zip(first, away, shares.each, u, strict=True)]
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


class _Bin(NamedTuple):
    """One bin's knots over boxes, (B, e) each, or their derivatives."""

    x: Interval
    y: Interval
    w: Interval
    h: Interval
    d0: Interval
    d1: Interval

    @classmethod
    def taken(cls, knots: Interval, index: Tensor, bins: int) -> _Bin:
        """Bin ``index`` (B, e) of all knots (B, (5 bins + 3) e)."""
        stacked = knots.map(lambda t: t.reshape(len(t), 5 * bins + 3, -1))

        def at(start: int) -> Interval:
            return stacked.map(lambda t: t.gather(1, (start + index)[:, None])[:, 0])

        n = bins
        return cls(at(0), at(n + 1), at(2 * n + 2), at(3 * n + 2), at(4 * n + 2), at(4 * n + 3))


def spline_local(spline: RationalQuadraticSpline, knots: Interval, rates: Interval, x: Interval) -> Local:
    """Value and derivatives over boxes, the hull over the bins that they touch.

    Args:
        spline: which one.
        knots: over the boxes, (B, (5 bins + 3) e).
        rates: their derivatives, likewise.
        x: the changed entries, (B, e).
    """

    def inside(index: Tensor) -> tuple[Interval, ...]:
        return _inside(x, _Bin.taken(knots, index, spline.bins), _Bin.taken(rates, index, spline.bins))

    parts = _over_bins(spline, knots, x, inside)
    value, slope, moves, relative = _outside(spline, x, parts) if spline.tails else parts
    return Local(value, slope, moves.map(lambda t: t[..., None]), relative.map(lambda t: t[..., None]))


def spline_value(spline: RationalQuadraticSpline, knots: Interval, x: Interval) -> Interval:
    """The value alone."""

    def inside(index: Tensor) -> tuple[Interval, ...]:
        q = _Bin.taken(knots, index, spline.bins)
        b = SplineBin(x, q.x, q.w, q.y, q.h, (q.d0, q.d1))
        return (b.y + b.h * b.alpha,)

    parts = _over_bins(spline, knots, x, inside)
    return (_outside(spline, x, parts) if spline.tails else parts)[0]


def _over_bins(
    spline: RationalQuadraticSpline, knots: Interval, x: Interval, inside: Callable[[Tensor], tuple[Interval, ...]]
) -> tuple[Interval, ...]:
    """The hull over the bins that boxes touch; ``inside`` takes a bin for every entry, (B, e)."""
    n = spline.bins
    positions = knots[:, : (n + 1) * x.shape[1]].map(lambda t: t.reshape(len(t), n + 1, -1))
    touched = (x.lo[:, None] <= positions.hi[:, 1:]) & (x.hi[:, None] >= positions.lo[:, :-1])
    first = touched.int().argmax(1)
    last = n - 1 - touched.flip(1).int().argmax(1)
    parts: tuple[Interval, ...] | None = None
    for k in range(int((last - first).max()) + 1):
        index = torch.minimum(first + k, last)  # a bin that was there already changes nothing
        found = inside(index)
        parts = found if parts is None else tuple(a.hull(b) for a, b in zip(parts, found, strict=True))
    return parts or ()


def _inside(x: Interval, q: _Bin, rate: _Bin) -> tuple[Interval, ...]:
    b = SplineBin(x, q.x, q.w, q.y, q.h, (q.d0, q.d1))
    s_rate = (rate.h - b.s * rate.w) / q.w
    along = b.alpha_rates()
    own = rate.y + b.alpha * rate.h + q.h * (along[0] * s_rate + along[1] * rate.d0 + along[2] * rate.d1)
    shift = rate.x + b.xi * rate.w
    return b.y + b.h * b.alpha, b.slope, own - b.slope * shift, own / b.slope - shift


def _outside(spline: RationalQuadraticSpline, x: Interval, parts: Sequence[Interval]) -> tuple[Interval, ...]:
    """The hull with the identity where x may leave the bins."""
    out = (x.lo < spline.left) | (x.hi > spline.right)
    one = torch.ones_like(x.lo)
    identity = (x, Interval(one, one), Interval(0 * one, 0 * one), Interval(0 * one, 0 * one))
    return tuple(
        Interval(
            torch.where(out, torch.minimum(part.lo, other.lo), part.lo),
            torch.where(out, torch.maximum(part.hi, other.hi), part.hi),
        )
        for part, other in zip(parts, identity, strict=False)
    )
