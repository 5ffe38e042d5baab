"""Intervals of float64 tensors whose ends are rounded outwards after every operation, and boxes of data.

Elementary functions of torch are taken to be accurate to eight units in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.numerics.rounding import UNIT, gamma
from inn_guard.numerics.spectral_norm import exact

__all__ = ["Box", "Interval", "down", "linear", "up_tensor"]

Number = float | Tensor
_INF = torch.tensor(math.inf, dtype=torch.float64)
ELEMENTARY = 16 * UNIT  #: relative error of exp, log, sigmoid, ...


def up_tensor(x: Tensor) -> Tensor:
    """Every entry's next float above."""
    return torch.nextafter(x, _INF)


def down(x: Tensor) -> Tensor:
    """Every entry's next float below."""
    return torch.nextafter(x, -_INF)


@dataclass(frozen=True)
class Interval:
    """All tensors between ``lo`` and ``hi``, entry by entry; operations enclose every possible result.

    >>> third = Interval.of(1.0) / 3.0
    >>> float(third.lo) < 1 / 3 < float(third.hi)
    True
    """

    lo: Tensor
    hi: Tensor

    @classmethod
    def of(cls, x: Any) -> Interval:
        """The interval of one number or tensor; NaN becomes everything."""
        if isinstance(x, Interval):
            return x
        point = exact(x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64))
        return Interval(
            point.nan_to_num(-math.inf, math.inf, -math.inf),
            point.nan_to_num(math.inf, math.inf, -math.inf),
        )

    @classmethod
    def around(cls, x: Tensor) -> Interval:
        """A computed tensor with what 64 roundings may have lost of it; NaN and infinite entries become everything."""
        point = exact(x)
        slack = 64 * UNIT * point.abs()
        lo, hi = down(point - slack), up_tensor(point + slack)
        return cls(
            lo.nan_to_num(-math.inf, math.inf, -math.inf),
            hi.nan_to_num(math.inf, math.inf, -math.inf),
        )

    @classmethod
    def cat(cls, parts: Sequence[Interval], dim: int = 0) -> Interval:
        """The parts side by side."""
        return Interval(
            torch.cat([part.lo for part in parts], dim), torch.cat([part.hi for part in parts], dim)
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """A map that moves entries (index, reshape, permute, expand) applied to both ends."""
        return Interval(function(self.lo), function(self.hi))

    def __getitem__(self, index: Any) -> Interval:
        return Interval(self.lo[index], self.hi[index])

    @property
    def shape(self) -> torch.Size:
        """Of the tensors."""
        return self.lo.shape

    @property
    def bounded(self) -> bool:
        """Whether every end is finite."""
        return bool(torch.isfinite(self.lo).all() and torch.isfinite(self.hi).all())

    @property
    def magnitude(self) -> Tensor:
        """Largest absolute value, entry by entry."""
        return torch.maximum(self.lo.abs(), self.hi.abs())

    @property
    def mignitude(self) -> Tensor:
        """Smallest absolute value, entry by entry."""
        return torch.where(
            (self.lo <= 0) & (self.hi >= 0), 0.0, torch.minimum(self.lo.abs(), self.hi.abs())
        )

    @property
    def centre(self) -> Tensor:
        """A point inside."""
        return torch.minimum(torch.maximum(self.lo / 2 + self.hi / 2, self.lo), self.hi)

    @property
    def radius(self) -> Tensor:
        """Largest distance from ``centre``, rounded up."""
        c = self.centre
        return up_tensor(torch.maximum(self.hi - c, c - self.lo))

    def sup(self) -> float:
        """The largest number in the interval, over all entries."""
        return float(self.hi.max()) if self.hi.numel() else -math.inf

    def inf(self) -> float:
        """The smallest number in the interval, over all entries."""
        return float(self.lo.min()) if self.lo.numel() else math.inf

    def hull(self, other: Interval) -> Interval:
        """The smallest interval that holds both."""
        return Interval(torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi))

    def meet(self, other: Interval) -> Interval:
        """What both hold; both are known to hold the true value."""
        return Interval(torch.maximum(self.lo, other.lo), torch.minimum(self.hi, other.hi))

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __add__(self, other: Interval | Number) -> Interval:
        other = Interval.of(other)
        return _outward(self.lo + other.lo, self.hi + other.hi)

    def __sub__(self, other: Interval | Number) -> Interval:
        return self + (-Interval.of(other))

    def __mul__(self, other: Interval | Number) -> Interval:
        other = Interval.of(other)
        products = [self.lo * other.lo, self.lo * other.hi, self.hi * other.lo, self.hi * other.hi]
        lo, hi = _extremes(products)
        if bool(lo.isnan().any()):
            # zero times infinity is zero: infinite ends stand for numbers without bound, not for infinity
            lo, hi = _extremes([torch.where(p.isnan(), 0.0, p) for p in products])
        return _outward(lo, hi)

    def __truediv__(self, other: Interval | Number) -> Interval:
        return self * Interval.of(other).reciprocal()

    def __rsub__(self, other: Number) -> Interval:
        return Interval.of(other) - self

    def __rtruediv__(self, other: Number) -> Interval:
        return Interval.of(other) * self.reciprocal()

    __radd__ = __add__
    __rmul__ = __mul__

    def reciprocal(self) -> Interval:
        """1 / x; everything where x may be zero."""
        crosses = (self.lo <= 0) & (self.hi >= 0)
        low, high = 1 / self.hi, 1 / self.lo
        return _outward(torch.where(crosses, -math.inf, low), torch.where(crosses, math.inf, high))

    def square(self) -> Interval:
        """x^2, never below zero."""
        low, high = self.mignitude, self.magnitude
        return Interval(down(low * low).clamp_min(0), up_tensor(high * high))

    def sqrt(self) -> Interval:
        """The root of what is not negative."""
        return Interval(
            down(self.lo.clamp_min(0).sqrt()).clamp_min(0), up_tensor(self.hi.clamp_min(0).sqrt())
        )

    def abs(self) -> Interval:
        """|x|."""
        return Interval(self.mignitude, self.magnitude)

    def maximum(self, other: Interval | Number) -> Interval:
        """The larger of both."""
        other = Interval.of(other)
        return Interval(torch.maximum(self.lo, other.lo), torch.maximum(self.hi, other.hi))

    def minimum(self, other: Interval | Number) -> Interval:
        """The smaller of both."""
        other = Interval.of(other)
        return Interval(torch.minimum(self.lo, other.lo), torch.minimum(self.hi, other.hi))

    def exp(self) -> Interval:
        """e^x."""
        raised = self.increasing(torch.exp)
        return Interval(raised.lo.clamp_min(0), raised.hi)

    def log(self) -> Interval:
        """The natural logarithm of what is positive."""
        return Interval(self.lo.clamp_min(0), self.hi.clamp_min(0)).increasing(torch.log)

    def increasing(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """An increasing elementary function of torch."""
        low, high = function(self.lo), function(self.hi)
        lo, hi = low - ELEMENTARY * low.abs(), high + ELEMENTARY * high.abs()
        return _outward(
            lo.nan_to_num(-math.inf, math.inf, -math.inf),
            hi.nan_to_num(math.inf, math.inf, -math.inf),
        )

    def sum(self, dim: int = -1) -> Interval:
        """The sum along a dimension."""
        slack = gamma(self.shape[dim] + 1) * self.magnitude.sum(dim) * (1 + 1e-9)
        return _outward(self.lo.sum(dim) - slack, self.hi.sum(dim) + slack)


class Box(Interval):
    """The data on which a bound holds: all x with lo <= x <= hi, of the shape of one sample (no batch).

    Args:
        lo: lower corner; a tensor of the shape of one sample.
        hi: upper corner, of the same shape.

    Raises:
        ValueError: if the shapes differ, an entry is NaN, or lo > hi somewhere.

    >>> Box(torch.zeros(2), torch.ones(2)).bounded
    True
    """

    def __init__(self, lo: Tensor, hi: Tensor) -> None:
        lo, hi = exact(torch.as_tensor(lo)), exact(torch.as_tensor(hi))
        if lo.shape != hi.shape:
            raise ValueError(
                f"expected two corners of one shape, got {tuple(lo.shape)} and {tuple(hi.shape)}"
            )
        if not bool((lo <= hi).all()):
            raise ValueError("expected lo <= hi in every entry, and no NaN")
        super().__init__(lo, hi)

    @classmethod
    def everywhere(cls, shape: Sequence[int]) -> Box:
        """All of R^shape: bounds on it are global."""
        return cls(torch.full(tuple(shape), -math.inf), torch.full(tuple(shape), math.inf))

    @classmethod
    def around(cls, x: Tensor) -> Box:
        """The smallest box that holds every sample of a batch x (B, *shape)."""
        return cls(x.amin(0), x.amax(0))


def linear(weight: Tensor, x: Interval) -> Interval:
    """W x for x (..., n) and W (m, n), both exact: centre and radius, with the rounding of both products.

    Infinite or unknown entries make everything unknown that depends on them.
    """
    if not x.bounded or not bool(weight.isfinite().all()):
        return _unbounded_linear(weight, x)
    size = weight.abs()
    centre, radius = x.centre @ weight.mT, x.radius @ size.mT
    slack = gamma(weight.shape[-1] + 4) * 2 * (x.magnitude @ size.mT + radius) * (1 + 1e-9)
    return _outward(centre - radius - slack, centre + radius + slack)


def _unbounded_linear(weight: Tensor, x: Interval) -> Interval:
    unknown = ~(torch.isfinite(x.lo) & torch.isfinite(x.hi))
    known = linear(
        weight.nan_to_num(0, 0, 0),
        Interval(x.lo.masked_fill(unknown, 0), x.hi.masked_fill(unknown, 0)),
    )
    touched = (unknown.double() @ (weight != 0).double().mT > 0) | ~weight.isfinite().all(-1)
    return Interval(
        known.lo.masked_fill(touched, -math.inf), known.hi.masked_fill(touched, math.inf)
    )


def _extremes(candidates: list[Tensor]) -> tuple[Tensor, Tensor]:
    a, b, c, d = candidates
    return torch.minimum(torch.minimum(a, b), torch.minimum(c, d)), torch.maximum(
        torch.maximum(a, b), torch.maximum(c, d)
    )


def _outward(lo: Tensor, hi: Tensor) -> Interval:
    return Interval(down(lo), up_tensor(hi))
