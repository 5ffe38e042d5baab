"""What monotone splines of a network's raw outputs share, and the piecewise linear spline."""

# Methods without a docstring are documented in Transformer.
# ruff: noqa: D102

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from inn_guard.lipschitz.transformers.base import clamped, constant, where
from inn_guard.numerics.intervals import Interval

__all__ = ["LinearSpline", "MonotoneSpline", "SoftmaxBounds", "position_in"]

TINY = 1e-300  #: bounds a share whose weight underflows to zero


@dataclass(frozen=True)
class SoftmaxBounds:
    """A softmax's entries p_j and their sums C_k before bin k, each enclosed on its own.

    Attributes:
        each: p_j.
        before: C_k = sum_{j<k} p_j for k = 0..bins.
    """

    each: list[Interval]
    before: list[Interval]

    @classmethod
    def of(cls, raw: list[Interval]) -> SoftmaxBounds:
        """From the softmax's inputs; C_k rises with those before k and falls with the others."""
        bins, top = len(raw), raw[0].hi
        for u in raw[1:]:
            top = torch.maximum(top, u.hi)
        weights = [(u - top).exp() for u in raw]
        zero = Interval.of(torch.zeros_like(top))
        from_left, from_right = [zero], [zero]
        for w, v in zip(weights, reversed(weights), strict=True):
            from_left.append(from_left[-1] + w)
            from_right.append(from_right[-1] + v)
        each, before = [], []
        for k, w in enumerate(weights):
            each.append(_share(w, from_left[k] + from_right[bins - k - 1]))
        for k in range(bins + 1):
            before.append(_share(from_left[k], from_right[bins - k]))
        return cls(each, before)

    def position_partial(self, j: int, k: int, xi: Interval) -> Interval:
        """d(C_k + xi p_k)/du_j = p_j (1[j<k] - C_k) + xi p_k (1[j=k] - p_j)."""
        start = -self.before[k]
        if j < k:
            start = 1.0 - self.before[k]
        inner = -self.each[j]
        if j == k:
            inner = 1.0 - self.each[k]
        return self.each[j] * start + xi * self.each[k] * inner

    def width_partial(self, j: int, k: int) -> Interval:
        """dp_k/du_j = p_k (1[j=k] - p_j)."""
        if j == k:
            return self.each[k] * (1.0 - self.each[k])
        return self.each[k] * -self.each[j]


def _share(part: Interval, others: Interval) -> Interval:
    """part / (part + others), rising in the one and falling in the other."""
    least, most = Interval(part.lo, part.lo), Interval(part.hi, part.hi)
    low = least / (least + Interval(others.hi, others.hi))
    high = most / (most + Interval(others.lo, others.lo))
    lo = torch.where(part.lo <= 0, 0.0, low.lo).clamp(0, 1)
    hi = torch.where(others.lo <= 0, 1.0, high.hi).clamp(0, 1)
    return Interval(lo, torch.where(part.hi <= 0, hi.clamp_max(TINY), hi))


def position_in(x: Interval, start: Interval, width: Interval) -> Interval:
    """(x - start) / width within [0, 1], for points of the bin."""
    return clamped((x - start) / width, 0.0, 1.0)


@dataclass(frozen=True)
class MonotoneSpline:
    """Increasing from [left, right] to itself, in bins.

    Attributes:
        bins: number of bins.
        left: left end, in x and in y.
        right: right end.
        tails: whether x may lie outside, where the spline is the identity.
    """

    bins: int
    left: float
    right: float
    tails: bool = True

    def _over_bins(
        self,
        x: Interval,
        in_bin: Callable[[int], list[Interval]],
        knots: list[Interval],
        *,
        outside: float | None,
        position: Interval | None = None,
    ) -> list[Interval]:
        """Hulls of several quantities over the bins that an interval may touch.

        Args:
            x: the interval.
            in_bin: the quantities in bin k.
            knots: bins + 1 knots.
            outside: every quantity's value in the tails; None for x itself.
            position: x in the coordinate of the knots; default: x.
        """
        at = x
        if position is not None:
            at = position
        hulls: list[Interval] = []
        nothing = Interval(torch.full_like(x.lo, math.inf), torch.full_like(x.hi, -math.inf))
        for k in range(self.bins):
            touched = (at.lo <= knots[k + 1].hi) & (at.hi >= knots[k].lo)
            parts = in_bin(k)
            hulls = hulls or [nothing] * len(parts)
            for n, part in enumerate(parts):
                hulls[n] = where(touched, hulls[n].hull(part), hulls[n])
        if not self.tails:
            return hulls
        in_tails = (x.lo < self.left) | (x.hi > self.right)
        identity = x
        if outside is not None:
            identity = constant(outside, x.lo)
        return [where(in_tails, hull.hull(identity), hull) for hull in hulls]

    def _within_range(self, y: Interval, x: Interval) -> Interval:
        """Values y no farther out than [left, right], or than x in the tails."""
        if not self.tails:
            return y
        return y.meet(Interval(x.lo.clamp_max(self.left), x.hi.clamp_min(self.right)))


@dataclass(frozen=True)
class LinearSpline(MonotoneSpline):
    """A softmax's cumulative sums at equal knots, straight in between."""

    @property
    def count(self) -> int:
        return self.bins

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """left + (right - left) (C_k + xi p_k)."""
        shares, size = SoftmaxBounds.of(theta), self.right - self.left

        def in_bin(k: int, xi: Interval) -> list[Interval]:
            return [(shares.before[k] + xi * shares.each[k]) * size + self.left]

        return self._over_equal_bins(x, in_bin, outside=None)[0]

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """bins p_k."""
        shares = SoftmaxBounds.of(theta)

        def in_bin(k: int, xi: Interval) -> list[Interval]:
            return [shares.each[k] * float(self.bins)]

        return self._over_equal_bins(x, in_bin, outside=1.0)[0]

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """(right - left) d(C_k + xi p_k)."""
        shares, size = SoftmaxBounds.of(theta), self.right - self.left

        def in_bin(k: int, xi: Interval) -> list[Interval]:
            return [shares.position_partial(j, k, xi) * size for j in range(self.bins)]

        return self._over_equal_bins(x, in_bin, outside=0.0)

    def log_sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """The sensitivities divided by bins p_k, bin by bin."""
        shares, size = SoftmaxBounds.of(theta), self.right - self.left

        def in_bin(k: int, xi: Interval) -> list[Interval]:
            slope, quotients = shares.each[k] * float(self.bins), []
            for j in range(self.bins):
                quotients.append(shares.position_partial(j, k, xi) * size / slope)
            return quotients

        return self._over_equal_bins(x, in_bin, outside=0.0)

    def _over_equal_bins(
        self,
        x: Interval,
        in_bin: Callable[[int, Interval], list[Interval]],
        *,
        outside: float | None,
    ) -> list[Interval]:
        width = Interval.of(self.right - self.left) / float(self.bins)
        knots = [width * float(k) + self.left for k in range(self.bins + 1)]

        def at_position(k: int) -> list[Interval]:
            return in_bin(k, position_in(x, knots[k], width))

        return self._over_bins(x, at_position, knots, outside=outside)
