"""Monotone splines in exact mode: integer cells, in each of which the map is a scale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inn_guard.exact.bijections import scale_by_ratio, undo_scale_by_ratio
from inn_guard.exact.fixed_point import FixedPoint, NoExactRule
from inn_guard.exact.steps import Step
from inn_guard.exact.tape import Tape, checksum

__all__ = ["Form", "Knots", "Spline", "cubic", "rational_quadratic"]

CELLS = 2048  #: of a bin


#: (position in a bin between 0 and 1, slope of the bin's chord, slopes at its left and right end)
#: -> share of the bin's height, from 0 to 1
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def rational_quadratic(theta: Tensor, slope: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The monotone rational-quadratic function with these slopes.

    References:
        Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019), section 3.1.
    """
    product = theta * (1 - theta)
    above = slope * theta * theta + left * product
    return above / (slope + (left + right - 2 * slope) * product)


def cubic(theta: Tensor, slope: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The cubic polynomial with these slopes.

    It is quadratic where the chord's slope is the mean of the two, and linear where all are equal.

    References:
        Cubic-Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019), section 3.
    """
    second, third = 3 * slope - 2 * left - right, left + right - 2 * slope
    return theta * (left + theta * (second + theta * third)) / slope


@dataclass(frozen=True)
class Knots:
    """Splines, each of K bins between knots; the identity outside of them.

    Attributes:
        x: of the knots, (B, n, K + 1) float64, increasing.
        y: of the knots, of the same shape; the first and last ones are those of x.
        left: slopes at the left ends of the bins, (B, n, K).
        right: slopes at their right ends.
        form: of the spline in a bin.
        outside: whether values outside of the knots are allowed.
    """

    x: Tensor
    y: Tensor
    left: Tensor
    right: Tensor
    form: Form
    outside: bool = True


class Spline(Step):
    """Some entries pass monotone splines, whose knots the other entries determine.

    Each bin has 2048 cells. The ends of cell m are a_m = a_0 + W m div 2048 and
    b_m = b_0 + 2 m + round((H - 2 * 2048) phi(m / 2048)), which increase whatever the rounding of
    the spline phi does. Cell [a_m, a_m+1) goes to [b_m, b_m+1) by a change of the mixed radix. phi
    takes only + - * / in float64, whose bits do not depend on the machine.

    Args:
        knots: x (B, *data), with zeros where the step changes it -> the splines of what it changes.
        changed: entries (indices into one flat sample) that are changed.
        dtype: in which the knots are computed.
        inverse: the inverse splines instead.
    """

    def __init__(
        self,
        knots: Callable[[Tensor], Knots],
        changed: Tensor,
        *,
        dtype: torch.dtype,
        inverse: bool = False,
    ) -> None:
        super().__init__(dtype)
        self.knots, self.changed, self.inverse = knots, changed, inverse

    def run(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The entries through their splines.

        Raises:
            NoExactRule: if the bins are too narrow, values need exponents or lie outside of the
                knots where they must not, or a spline decreases.
        """
        bins, part = self._evaluated(state)
        cells = bins.cells(part.units.long(), by_y=self.inverse)
        if bool((cells.height < 1).any()):
            raise NoExactRule("a spline decreases")
        if not (bins.outside or bool(cells.inside.all())):
            raise NoExactRule("a value lies outside of its spline's knots")
        start, den, end, num = cells.between(inverse=self.inverse)
        inside = replace(part, units=torch.where(cells.inside, part.units - start, 0))
        inside = scale_by_ratio(inside, num, den, tape)
        units = torch.where(cells.inside, end + inside.units, part.units)
        tape.push("digest", bins.checksum)
        return state.put(self.changed, replace(inside, units=units))

    def undo(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The entries back through their splines."""
        bins, part = self._evaluated(state)
        tape.compare(bins.checksum)
        cells = bins.cells(part.units.long(), by_y=not self.inverse)
        start, den, end, num = cells.between(inverse=self.inverse)
        inside = replace(part, units=torch.where(cells.inside, part.units - end, 0))
        inside = undo_scale_by_ratio(inside, num, den, tape)
        units = torch.where(cells.inside, start + inside.units, part.units)
        return state.put(self.changed, replace(inside, units=units))

    def inverted(self) -> Spline:
        """The inverse splines."""
        clone = copy.copy(self)
        clone.inverse = not self.inverse
        return clone

    def _evaluated(self, state: FixedPoint) -> tuple[_Bins, FixedPoint]:
        if state.exponent is not None:
            raise NoExactRule("its values need exponents")
        x = state.values(self.dtype)
        known = x.flatten(1).index_fill_(1, self.changed, 0).reshape(x.shape)
        return _Bins.of(self.knots(known), state), state.take(self.changed)


@dataclass(frozen=True)
class _Cells:
    """The cell of each entry, as integers (B, n).

    Attributes:
        inside: whether the entry lies between the outer knots.
        x: the cell's left end.
        width: its size there; 1 outside.
        y: its image's lower end.
        height: its image's size; 1 outside.
    """

    inside: Tensor
    x: Tensor
    width: Tensor
    y: Tensor
    height: Tensor

    def between(self, *, inverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(start, size there, end, size there) of the map, or of its inverse."""
        if inverse:
            return self.y, self.height, self.x, self.width
        return self.x, self.width, self.y, self.height


@dataclass(frozen=True)
class _Bins:
    """Integer knots, (B, n, K + 1), and the slopes of ``Knots``."""

    x: Tensor
    y: Tensor
    left: Tensor
    right: Tensor
    form: Form
    outside: bool

    @classmethod
    def of(cls, knots: Knots, state: FixedPoint) -> _Bins:
        if not bool(knots.x.isfinite().all() & knots.y.isfinite().all()):
            raise NoExactRule("a knot is not finite")
        x, y = (state.in_units(values).round().long() for values in (knots.x, knots.y))
        if bool((x.diff() < CELLS).any() | (y.diff() < 4 * CELLS).any()):
            raise NoExactRule("a bin is too narrow")
        return cls(x, y, knots.left, knots.right, knots.form, knots.outside)

    @property
    def checksum(self) -> tuple[int, ...]:
        return checksum(self.x, self.y, self.left, self.right)

    def cells(self, units: Tensor, *, by_y: bool) -> _Cells:
        """The cells in which entries, x or y, lie."""
        # the ends of x and y are the same
        inside = (units >= self.x[..., 0]) & (units < self.x[..., -1])
        edges = (self.y if by_y else self.x)[..., 1:-1].contiguous()
        number = torch.searchsorted(edges, units[..., None].contiguous(), right=True)
        bin_ = _Bin.of(self, number)
        cell = _last_below(bin_.y if by_y else bin_.x, units)
        x, y = bin_.x(cell), bin_.y(cell)
        width, height = bin_.x(cell + 1) - x, bin_.y(cell + 1) - y
        return _Cells(inside, x, torch.where(inside, width, 1), y, torch.where(inside, height, 1))


@dataclass(frozen=True)
class _Bin:
    """The bin of each entry, (B, n)."""

    left: Tensor
    lower: Tensor
    width: Tensor
    height: Tensor
    slope: Tensor
    first: Tensor
    last: Tensor
    form: Form

    @classmethod
    def of(cls, bins: _Bins, number: Tensor) -> _Bin:
        """Args: number: of the bin, (B, n, 1)."""
        left, right = _pick(bins.x, number), _pick(bins.x, number + 1)
        lower, upper = _pick(bins.y, number), _pick(bins.y, number + 1)
        width, height = right - left, upper - lower
        return cls(
            left,
            lower,
            width,
            height,
            height.double() / width.double(),
            _pick(bins.left, number),
            _pick(bins.right, number),
            bins.form,
        )

    def x(self, cell: Tensor) -> Tensor:
        """The left end of a cell."""
        return self.left + torch.div(self.width * cell, CELLS, rounding_mode="floor")

    def y(self, cell: Tensor) -> Tensor:
        """The lower end of its image."""
        phi = self.form(cell.double() / CELLS, self.slope, self.first, self.last)
        return self.lower + 2 * cell + ((self.height - 2 * CELLS).double() * phi).round().long()


def _pick(knots: Tensor, number: Tensor) -> Tensor:
    return knots.gather(-1, number)[..., 0]


def _last_below(end: Callable[[Tensor], Tensor], units: Tensor) -> Tensor:
    """The last cell whose end is not above the entry, by bisection."""
    cell = torch.zeros_like(units)
    step = CELLS // 2
    while step:
        further = cell + step
        cell = torch.where(end(further) <= units, further, cell)
        step //= 2
    return cell
