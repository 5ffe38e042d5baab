"""Intervals of float64 tensors, rounded outwards after every operation, and boxes of data.

Elementary functions of torch are taken to be accurate to eight units in the last place.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inn_guard.numerics.rounding import UNIT, enlarged, gamma
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
    """All tensors between ``lo`` and ``hi``; operations enclose every possible result.

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
        if not isinstance(x, Tensor):
            x = torch.tensor(x, dtype=torch.float64)
        point = exact(x)
        return Interval.unless_nan(point, point)

    @staticmethod
    def unless_nan(lo: Tensor, hi: Tensor) -> Interval:
        """The interval of two ends; NaN becomes unbounded."""
        return Interval(
            lo.nan_to_num(-math.inf, math.inf, -math.inf),
            hi.nan_to_num(math.inf, math.inf, -math.inf),
        )

    @classmethod
    def around(cls, x: Tensor) -> Interval:
        """A tensor that was computed with at most 64 roundings per entry; NaN becomes unbounded."""
        point = exact(x)
        slack = 64 * UNIT * point.abs()
        return cls.unless_nan(down(point - slack), up_tensor(point + slack))

    @classmethod
    def cat(cls, parts: Sequence[Interval], dim: int = 0) -> Interval:
        """The parts, concatenated along a dimension."""
        lo = torch.cat([part.lo for part in parts], dim)
        hi = torch.cat([part.hi for part in parts], dim)
        return Interval(lo, hi)

    def map(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """A map that moves entries (index, reshape, permute, expand) applied to both ends."""
        return Interval(function(self.lo), function(self.hi))

    def __getitem__(self, index: Any) -> Interval:
        return Interval(self.lo[index], self.hi[index])

    @property
    def shape(self) -> torch.Size:
        """The shape of both ends."""
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
        smallest = torch.minimum(self.lo.abs(), self.hi.abs())
        return torch.where(self.holds_zero, 0.0, smallest)

    @property
    def holds_zero(self) -> Tensor:
        """Whether zero is inside, entry by entry."""
        return (self.lo <= 0) & (self.hi >= 0)

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
        if not self.hi.numel():
            return -math.inf
        return float(self.hi.max())

    def inf(self) -> float:
        """The smallest number in the interval, over all entries."""
        if not self.lo.numel():
            return math.inf
        return float(self.lo.min())

    def hull(self, other: Interval) -> Interval:
        """The smallest interval that holds both."""
        return Interval(torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi))

    def meet(self, other: Interval) -> Interval:
        """The intersection of two enclosures of the same value."""
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
            # zero times infinity is zero: infinite ends stand for numbers without bound, not for
            # infinity
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
        crosses = self.holds_zero
        low, high = 1 / self.hi, 1 / self.lo
        return _outward(torch.where(crosses, -math.inf, low), torch.where(crosses, math.inf, high))

    def square(self) -> Interval:
        """x^2, never below zero."""
        low, high = self.mignitude, self.magnitude
        return Interval(down(low * low).clamp_min(0), up_tensor(high * high))

    def sqrt(self) -> Interval:
        """The root of what is not negative."""
        low, high = self.lo.clamp_min(0).sqrt(), self.hi.clamp_min(0).sqrt()
        return Interval(down(low).clamp_min(0), up_tensor(high))

    def abs(self) -> Interval:
        """|x|, entry by entry."""
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
        """e^x, never below zero."""
        raised = self.increasing(torch.exp)
        return Interval(raised.lo.clamp_min(0), raised.hi)

    def log(self) -> Interval:
        """The natural logarithm of what is positive."""
        return Interval(self.lo.clamp_min(0), self.hi.clamp_min(0)).increasing(torch.log)

    def increasing(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """An increasing elementary function of torch."""
        low, high = function(self.lo), function(self.hi)
        lo, hi = low - ELEMENTARY * low.abs(), high + ELEMENTARY * high.abs()
        known = Interval.unless_nan(lo, hi)
        return _outward(known.lo, known.hi)

    def sum(self, dim: int = -1) -> Interval:
        """The sum along a dimension."""
        terms = self.shape[dim]
        slack = gamma(terms + 1) * enlarged(self.magnitude.sum(dim), terms + 1)
        return _outward(self.lo.sum(dim) - slack, self.hi.sum(dim) + slack)


class Box(Interval):
    """All x with lo <= x <= hi, of the shape of one sample (no batch): where a bound holds.

    Args:
        lo: lower corner; a tensor of the shape of one sample.
        hi: upper corner, of the same shape.

    Raises:
        ValueError: if the shapes differ, an entry is NaN, or lo > hi somewhere.

    >>> Box(torch.zeros(2), torch.ones(2)).bounded
    True
    """

    def __init__(self, lo: Tensor, hi: Tensor) -> None:
        for corner in (lo, hi):
            if not isinstance(corner, (Tensor, numbers.Real, list, tuple, np.ndarray)):
                raise TypeError(
                    f"expected the corners of a box as tensors, got {type(corner).__name__}: pass "
                    "Box(lo, hi) of the shape of one sample, or Box.around(x)"
                )
        try:
            lo, hi = exact(torch.as_tensor(lo)), exact(torch.as_tensor(hi))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(
                f"expected the corners of a box as tensors of numbers: {error}"
            ) from error
        if lo.is_complex() or hi.is_complex():
            raise TypeError("expected the corners of a box as real numbers; got complex ones")
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
        """The smallest box that holds every sample of a batch x (B, *shape).

        Raises:
            ValueError: if there is no sample, or an entry is NaN.
        """
        if not x.is_floating_point():
            raise TypeError(f"expected a batch of real floating-point numbers; got {x.dtype}")
        if x.dim() < 2 or len(x) == 0:
            raise ValueError(f"expected a batch (B >= 1, *shape), got shape {tuple(x.shape)}")
        return cls(x.amin(0), x.amax(0))


def linear(weight: Tensor, x: Interval) -> Interval:
    """W x for x (..., n) and an exact W (m, n), by centre and radius.

    Infinite or unknown entries make everything unknown that depends on them.
    """
    if not x.bounded or not bool(weight.isfinite().all()):
        return _unbounded_linear(weight, x)
    size = weight.abs()
    centre, radius = x.centre @ weight.mT, x.radius @ size.mT
    operations = weight.shape[-1] + 4
    slack = 2 * gamma(operations) * enlarged(x.magnitude @ size.mT + radius, operations)
    return _outward(centre - radius - slack, centre + radius + slack)


def _unbounded_linear(weight: Tensor, x: Interval) -> Interval:
    unknown = ~(torch.isfinite(x.lo) & torch.isfinite(x.hi))
    known = linear(weight.nan_to_num(0, 0, 0), x.map(lambda end: end.masked_fill(unknown, 0)))
    depends = unknown.double() @ (weight != 0).double().mT > 0
    touched = depends | ~weight.isfinite().all(-1)
    lo = known.lo.masked_fill(touched, -math.inf)
    hi = known.hi.masked_fill(touched, math.inf)
    return Interval(lo, hi)


def _extremes(candidates: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(torch.broadcast_tensors(*candidates))
    return stacked.amin(0), stacked.amax(0)


def _outward(lo: Tensor, hi: Tensor) -> Interval:
    return Interval(down(lo), up_tensor(hi))
