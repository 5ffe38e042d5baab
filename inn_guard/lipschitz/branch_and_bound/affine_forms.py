"""Affine forms: numbers known up to linear terms in a box's coordinates and a rounded-up rest.

q = middle + sum_i slopes_i e_i + rho with |e_i| <= 1 and |rho| <= rest. All forms of a box share
the e_i: first-order terms cancel, so that an enclosure errs by the square of the box's width.

Rounding: an operation's exact middle and slopes differ from the computed ones by at most a few
units in the last place of the products of the operands' sizes. The rest includes this difference.

References:
    Affine Arithmetic: Concepts and Applications (de Figueiredo, Stolfi, 2004).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import UNIT

__all__ = ["AffineForm"]

#: relative error of an operation's middle and slopes; each takes a few roundings
ROUNDED = 32 * UNIT
#: more than the relative error of a sum and product of a few dozen positive numbers
UPWARDS = 1 + 64 * UNIT
TINY = 1e-290  #: more than what underflows in one operation


@dataclass(frozen=True)
class AffineForm:
    """Tensors of one shape, entry by entry.

    Attributes:
        middle: (*shape).
        slopes: the change from the box's middle to its side, by coordinate, (m, *shape).
        rest: (*shape), not negative; infinite or NaN where nothing is known.
    """

    middle: Tensor
    slopes: Tensor
    rest: Tensor

    @classmethod
    def coordinates(cls, box: Interval) -> AffineForm:
        """The boxes' own points, (B, d): entry i moves with coordinate i."""
        radius = box.radius.clamp_min(TINY)
        unit = torch.eye(box.shape[1], dtype=torch.float64)[:, None]
        return cls(box.centre, unit * radius, torch.zeros_like(radius))

    @classmethod
    def of(cls, x: Interval, coordinates: int) -> AffineForm:
        """Numbers of which only an interval is known."""
        middle = x.centre
        return cls(middle, middle.new_zeros(coordinates, *middle.shape), x.radius)

    def constant(self, value: float) -> AffineForm:
        """One exact number in every entry of this form's shape."""
        zero = torch.zeros_like(self.rest)
        return AffineForm(torch.full_like(self.middle, value), torch.zeros_like(self.slopes), zero)

    @property
    def shape(self) -> torch.Size:
        """The shape of the middle."""
        return self.middle.shape

    @functools.cached_property
    def linear(self) -> Tensor:
        """An upper bound of the linear part's magnitude."""
        return self.slopes.abs().sum(0) * UPWARDS

    @functools.cached_property
    def spread(self) -> Tensor:
        """An upper bound of the distance from the middle."""
        return (self.linear + self.rest) * UPWARDS

    @functools.cached_property
    def size(self) -> Tensor:
        """An upper bound of the magnitude."""
        return (self.middle.abs() + self.spread) * UPWARDS

    @property
    def range(self) -> Interval:
        """The interval of all values; everything where nothing is known."""
        spread = self.spread + ROUNDED * self.middle.abs()
        lo, hi = (self.middle - spread) - TINY, (self.middle + spread) + TINY
        return Interval(
            lo.nan_to_num(-math.inf, math.inf, -math.inf),
            hi.nan_to_num(math.inf, math.inf, -math.inf),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> AffineForm:
        """A map that moves entries (index, reshape, expand)."""
        slopes = torch.stack([function(slope) for slope in self.slopes])
        return AffineForm(function(self.middle), slopes, function(self.rest))

    def __getitem__(self, index: Any) -> AffineForm:
        if not isinstance(index, tuple):
            index = (index,)
        every_slope = (slice(None), *index)
        return AffineForm(self.middle[index], self.slopes[every_slope], self.rest[index])

    def replaced(self, index: Tensor, part: AffineForm, dim: int = 1) -> AffineForm:
        """Other entries at some places of a dimension."""
        return AffineForm(
            self.middle.index_copy(dim, index, part.middle),
            self.slopes.index_copy(dim + 1, index, part.slopes),
            self.rest.index_copy(dim, index, part.rest),
        )

    def __neg__(self) -> AffineForm:
        return AffineForm(-self.middle, -self.slopes, self.rest)

    def __add__(self, other: AffineForm | Tensor | float) -> AffineForm:
        if not isinstance(other, AffineForm):
            middle = self.middle + other
            slopes = self.slopes.expand(len(self.slopes), *middle.shape)
            return AffineForm(middle, slopes, (self.rest + ROUNDED * middle.abs()) * UPWARDS)
        self._comparable(other)
        middle, slopes = self.middle + other.middle, self.slopes + other.slopes
        rest = self.rest + other.rest + ROUNDED * (middle.abs() + slopes.abs().sum(0))
        return AffineForm(middle, slopes, rest * UPWARDS)

    def __sub__(self, other: AffineForm | Tensor | float) -> AffineForm:
        return self + (-other)

    def __mul__(self, other: AffineForm | Tensor | float) -> AffineForm:
        if not isinstance(other, AffineForm):
            size: Any = abs(other)
            rest = (self.rest + ROUNDED * self.size) * size + TINY
            return AffineForm(self.middle * other, self.slopes * other, rest * UPWARDS)
        self._comparable(other)
        a, b = self, other
        slopes = torch.addcmul(b.middle * a.slopes, a.middle, b.slopes)
        # x = a + la + ra, y = b + lb + rb: xy less its linear part is at most
        # la lb + (|a| + |la|) rb + ra (|b| + |lb| + rb)
        rest = torch.addcmul(a.linear * b.linear, a.size, b.rest).addcmul(a.rest, b.size)
        rest = rest.addcmul(a.size, b.size, value=ROUNDED) + TINY
        return AffineForm(a.middle * b.middle, slopes, rest * UPWARDS)

    def _comparable(self, other: AffineForm) -> None:
        # the slopes' first dimension is that of the coordinates: broadcasting would mistake it
        if self.slopes.dim() != other.slopes.dim():
            raise ValueError(
                "expected two forms with as many dimensions, "
                f"got {tuple(self.shape)} and {tuple(other.shape)}; insert dimensions of size 1"
            )

    def __rsub__(self, other: Tensor | float) -> AffineForm:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def square(self) -> AffineForm:
        """x^2; the linear part's square is between zero and its largest."""
        half = self.linear.square() * 0.5
        size = self.size
        rest = half + 2 * size * self.rest + (2 * ROUNDED) * size.square() + TINY
        return AffineForm(
            self.middle.square() + half, (2 * self.middle) * self.slopes, rest * UPWARDS
        )

    def reciprocal(self) -> AffineForm:
        """1 / x; unknown where x may be zero.

        1/x = 1/c - (x - c)/c^2 + (x - c)^2 / (c^2 x), and the last term has the sign of c.
        """
        inverse = 1 / self.middle
        square = inverse.square()
        least = self.middle.abs() * (1 - 2 * UNIT) - self.spread * UPWARDS
        half = self.spread.square() * square * 0.5 / least
        rounding = ROUNDED * (inverse.abs() + square * self.spread + half) + TINY
        rest = half + square * self.rest + rounding
        # the square of the middle is in the range of floats
        in_range = (self.middle.abs() > 1e-150) & (self.middle.abs() < 1e150)
        known = (least > 0) & in_range
        rest = torch.where(known, rest * UPWARDS, math.inf)
        return AffineForm(inverse + half.copysign(self.middle), -square * self.slopes, rest)

    def within(self, inner: AffineForm, box: Interval) -> AffineForm:
        """A form in the coordinates of ``box`` (B, d), as one in those of ``inner`` (B, d).

        ``box`` is the range of ``inner``. A computation in the coordinates of the box loses nothing
        of what ``inner`` knows as rest only.
        """
        radius = box.radius.clamp_min(TINY)
        size = self.slopes.abs()
        slopes = []
        for slope in inner.slopes:
            share = self._along_coordinates(slope / radius)
            slopes.append((self.slopes * share).sum(0))
        unexplained = ((inner.middle - box.centre).abs() + inner.rest) / radius
        rest = self.rest + (size * self._along_coordinates(unexplained)).sum(0)
        rest = rest + ROUNDED * size.sum(0) + TINY
        return AffineForm(self.middle, torch.stack(slopes), rest * UPWARDS)

    def _along_coordinates(self, values: Tensor) -> Tensor:
        """(B, d) -> (d, B, 1, ...), which broadcasts with the slopes."""
        return values.T.reshape(*values.T.shape, *[1] * (self.middle.dim() - 1))

    def better(self, other: Interval) -> AffineForm:
        """This, or another enclosure of the same number, whichever is narrower, entry by entry."""
        keep = (self.spread <= other.radius) | other.radius.isnan()
        return self.where(
            keep, AffineForm(other.centre, torch.zeros_like(self.slopes), other.radius)
        )

    def where(self, keep: Tensor, other: AffineForm) -> AffineForm:
        """This where ``keep`` holds, the other form elsewhere."""
        return AffineForm(
            torch.where(keep, self.middle, other.middle),
            torch.where(keep, self.slopes, other.slopes),
            torch.where(keep, self.rest, other.rest),
        )

    def widened(self, error: Tensor | float) -> AffineForm:
        """With more rest."""
        return AffineForm(self.middle, self.slopes, (self.rest + error) * UPWARDS)

    def weighted(self, slope: Interval, at_middle: Interval) -> AffineForm:
        """f(x) for a function with f(middle) and f' over the range known: f(c) + f' (x - c)."""
        steep, error = slope.centre, slope.radius
        middle = at_middle.centre
        rest = at_middle.radius + steep.abs() * self.rest + error * self.spread
        rest = rest + ROUNDED * (middle.abs() + steep.abs() * self.linear) + TINY
        return AffineForm(middle, steep * self.slopes, rest * UPWARDS)

    def hull(self, other: AffineForm) -> AffineForm:
        """One form that holds what either holds."""
        middle, slopes = (self.middle + other.middle) * 0.5, (self.slopes + other.slopes) * 0.5
        apart = (self.middle - other.middle).abs() + (self.slopes - other.slopes).abs().sum(0)
        size = self.middle.abs() + other.middle.abs()
        size = size + self.slopes.abs().sum(0) + other.slopes.abs().sum(0)
        rest = 0.5 * apart + torch.maximum(self.rest, other.rest) + ROUNDED * size + TINY
        return AffineForm(middle, slopes, rest * UPWARDS)

    def sum(self, dim: int) -> AffineForm:
        """The sum along a dimension of a few entries."""
        dim = dim % self.middle.dim()
        total = self._entry(dim, 0)
        for k in range(1, self.shape[dim]):
            total = total + self._entry(dim, k)
        return total

    def _entry(self, dim: int, k: int) -> AffineForm:
        slopes = self.slopes.select(dim + 1, k)
        return AffineForm(self.middle.select(dim, k), slopes, self.rest.select(dim, k))

    @classmethod
    def stack(cls, parts: Sequence[AffineForm], dim: int = 0) -> AffineForm:
        """In a new dimension (not a negative one)."""
        return cls(
            torch.stack([part.middle for part in parts], dim),
            torch.stack([part.slopes for part in parts], dim + 1),
            torch.stack([part.rest for part in parts], dim),
        )
