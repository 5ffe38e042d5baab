"""Tables of a scalar function's values and derivatives, looked up for affine forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inn_guard.lipschitz.branch_and_bound.affine_forms import AffineForm
from inn_guard.lipschitz.branch_and_bound.taylor import Jet
from inn_guard.numerics.intervals import Interval

__all__ = ["Curve", "Table"]

CHUNK = 1024  #: cells evaluated at once


class Curve(NamedTuple):
    """Functions of one input over boxes, (entries, B).

    Attributes:
        value: q.
        rate: q'.
    """

    value: AffineForm
    rate: AffineForm


class Table:
    """A function of one input, evaluated once on the cells of a grid.

    With the middle m of the cell that holds the box's middle, and q'' = b +- r over all the cells
    that the box touches, q(u) = q(m) + q'(m) (u - m) + b (u - m)^2 / 2 up to r |u - m|^2 / 2 and
    q'(u) = q'(m) + b (u - m) up to r |u - m|. Where q' jumps, as with ReLU, q' = b +- r over the
    cells, and q(u) = q(m) + b (u - m) up to r |u - m|.

    Args:
        jet: the function over boxes (B, 1).
        low: left end of the grid.
        high: right end; beyond the grid the function is unknown.
        cells: number of cells.
        groups: number of groups of equal length that the outputs consist of; a query takes one.
    """

    def __init__(
        self,
        jet: Callable[[Interval], Jet],
        low: float,
        high: float,
        *,
        cells: int,
        groups: int = 1,
    ) -> None:
        # a box that ends where the grid does ends a little beyond, as an affine form
        margin = 1e-6 * (high - low) + 1e-12 * (1 + max(abs(low), abs(high)))
        low, high = low - margin, high + margin
        edges = torch.linspace(low, high, cells + 1, dtype=torch.float64)
        self.low, self.high, self.width, self.groups = low, high, (high - low) / cells, groups
        self.middle = Interval(edges[:-1], edges[1:]).centre
        value, rate, slope, second = _over_cells(jet, edges)
        self.error = float(torch.maximum(value.radius.max(), rate.radius.max()))
        self.points = self._rows(value.centre, rate.centre)
        self.smooth = second.bounded
        if self.smooth:
            windows, self.lengths = _windows(second)
        else:
            windows, self.lengths = _windows(slope)
        self.changes = self._rows(windows.centre, windows.radius)

    def _rows(self, *columns: Tensor) -> Tensor:
        """(cells * groups, 2 * entries)."""
        return torch.stack([c.reshape(len(c) * self.groups, -1) for c in columns], 1).flatten(1)

    def nearest(self, u: Tensor) -> Tensor:
        """The cell of a point, or the one next to it, (B,)."""
        cell = ((u - self.low) / self.width).nan_to_num(0, 0, 0)
        return cell.clamp(0, len(self.middle) - 1).long()

    def __call__(self, u: AffineForm, group: Tensor | int = 0) -> Curve:
        """The function over u (B,): one group of its outputs, (entries, B)."""
        cell, box = self.nearest(u.middle), u.range
        offset = u - self.middle[cell]
        value, rate = self._taken(self.points, cell * self.groups + group)
        window, unknown = self._window(box)
        change, error = self._taken(self.changes, window * self.groups + group)
        away, offset = offset.size, offset[None]
        if not self.smooth:
            slope = (offset * 0.0 + change).widened(error + unknown)
            moved = offset * change + value
            return Curve(moved.widened(error * away + self.error + unknown), slope)
        moved = offset * rate + offset.square() * (0.5 * change) + value
        slope = offset * change + rate
        value_error = 0.5 * error * away.square() + self.error * (1 + away) + unknown
        return Curve(moved.widened(value_error), slope.widened(error * away + self.error + unknown))

    def _window(self, box: Interval) -> tuple[Tensor, Tensor]:
        """The window that covers a box, and zero; infinity if there is none, or beyond the grid."""
        # a little more on both sides, for the rounding of the edges
        start = self.nearest(box.lo - 1e-9 * self.width)
        end = self.nearest(box.hi + 1e-9 * self.width)
        length = torch.bucketize(end - start, self.lengths)
        inside = (length < len(self.lengths)) & (box.lo >= self.low) & (box.hi <= self.high)
        length = length.clamp_max(len(self.lengths) - 1)
        return length * len(self.middle) + start, torch.where(inside, 0.0, math.inf)

    def _taken(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        first, second = rows.index_select(0, index).T.contiguous().chunk(2)
        return first, second


def _over_cells(
    jet: Callable[[Interval], Jet], edges: Tensor
) -> tuple[Interval, Interval, Interval, Interval]:
    """Values and derivatives in the middles, and first and second derivatives over the cells."""
    values, rates, slopes, seconds = [], [], [], []
    for start, end in zip(edges[:-1].split(CHUNK), edges[1:].split(CHUNK), strict=True):
        found = jet(Interval(start[:, None], end[:, None]))
        if found.second_derivative is None:
            raise ValueError("expected a function of one input, got one of several")
        values.append(found.centre)
        rates.append(found.rate[:, 0])
        slopes.append(found.slope[:, 0])
        seconds.append(found.second_derivative[:, 0])
    return Interval.cat(values), Interval.cat(rates), Interval.cat(slopes), Interval.cat(seconds)


def _windows(cells: Interval) -> tuple[Interval, Tensor]:
    """Hulls of every cell with the next 0, 1, 2, 4, ... cells, concatenated, and those numbers."""
    count, index = len(cells.lo), torch.arange(len(cells.lo))
    windows, lengths, length = [cells], [0], 1
    while 4 * length <= count:
        step = max(length // 2, 1)
        windows.append(windows[-1].hull(windows[-1][(index + step).clamp_max(count - 1)]))
        lengths.append(length)
        length *= 2
    return Interval.cat(windows), torch.tensor(lengths)
