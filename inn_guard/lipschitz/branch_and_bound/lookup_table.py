"""Tables of a scalar function's values, derivatives and second derivatives, looked up for affine forms."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inn_guard.lipschitz.branch_and_bound.affine_forms import AffineForm
from inn_guard.lipschitz.branch_and_bound.taylor import Jet, Jets
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

    With the middle m of the cell that holds the box's middle, and q'' = b +- r over all the cells that the box touches,
    q(u) = q(m) + q'(m) (u - m) + b (u - m)^2 / 2 and q'(u) = q'(m) + b (u - m), up to r |u - m|^2 / 2 and r |u - m|.
    Where q' jumps, as with ReLU, q' = b +- r over the cells, and q(u) = q(m) + b (u - m) up to r |u - m|.

    Args:
        jets: the function.
        low: left end of the grid.
        high: right end; of what leaves the grid nothing is known.
        cells: number of cells.
        groups: the outputs are so many groups of equal length, of which queries take one.
    """

    def __init__(self, jets: Jets, low: float, high: float, *, cells: int, groups: int = 1) -> None:
        # forms that end where the grid does end a little beyond
        margin = 1e-6 * (high - low) + 1e-12 * (1 + max(abs(low), abs(high)))
        low, high = low - margin, high + margin
        edges = torch.linspace(low, high, cells + 1, dtype=torch.float64)
        self.low, self.high, self.width, self.groups = low, high, (high - low) / cells, groups
        found = [
            jets.jet(Interval(a[:, None], b[:, None]))
            for a, b in zip(edges[:-1].split(CHUNK), edges[1:].split(CHUNK), strict=True)
        ]
        self.middle = Interval(edges[:-1], edges[1:]).centre
        value, rate = (Interval.cat(parts) for parts in zip(*map(_thin, found), strict=True))
        self.error = float(torch.maximum(value.radius.max(), rate.radius.max()))
        self.points = self._rows(value.centre, rate.centre)
        bends = Interval.cat(
            [j.second_derivative[:, 0] for j in found if j.second_derivative is not None]
        )
        self.smooth = bends.bounded
        changes = bends if self.smooth else Interval.cat([j.slope[:, 0] for j in found])
        windows, self.lengths = _windows(changes)
        self.changes = self._rows(windows.centre, windows.radius)

    def _rows(self, *columns: Tensor) -> Tensor:
        """(cells * groups, 2 * entries)."""
        return torch.stack([c.reshape(len(c) * self.groups, -1) for c in columns], 1).flatten(1)

    def nearest(self, u: Tensor) -> Tensor:
        """The cell of a point, or the next to it, (B,)."""
        cell = ((u - self.low) / self.width).nan_to_num(0, 0, 0)
        return cell.clamp(0, len(self.middle) - 1).long()

    def __call__(self, u: AffineForm, group: Tensor | None = None) -> Curve:
        """The function over u (B,): one group of its outputs, (entries, B), the first unless given."""
        cell = self.nearest(u.middle)
        offset = u - self.middle[cell]
        box = u.range
        # a little more on both sides, for the rounding of the edges
        start, end = (
            self.nearest(box.lo - 1e-9 * self.width),
            self.nearest(box.hi + 1e-9 * self.width),
        )
        window = torch.bucketize(end - start, self.lengths)
        inside = (window < len(self.lengths)) & (box.lo >= self.low) & (box.hi <= self.high)
        window = window.clamp_max(len(self.lengths) - 1)
        row = torch.zeros_like(cell) if group is None else group
        value, rate = self._taken(self.points, cell * self.groups + row)
        change, error = self._taken(
            self.changes, (window * len(self.middle) + start) * self.groups + row
        )
        away, beyond, offset = offset.size, torch.where(inside, 0.0, math.inf), offset[None]
        if not self.smooth:
            slope = (offset * 0.0 + change).widened(error + beyond)
            return Curve(
                (offset * change + value).widened(error * away + self.error + beyond), slope
            )
        moved = offset * rate + offset.square() * (0.5 * change) + value
        return Curve(
            moved.widened(0.5 * error * away.square() + self.error * (1 + away) + beyond),
            (offset * change + rate).widened(error * away + self.error + beyond),
        )

    def _taken(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        first, second = rows.index_select(0, index).T.contiguous().chunk(2)
        return first, second


def _thin(jet: Jet) -> tuple[Interval, Interval]:
    if jet.second_derivative is None:
        raise ValueError("expected a function of one input")
    return jet.centre, jet.rate[:, 0]


def _windows(cells: Interval) -> tuple[Interval, Tensor]:
    """Hulls of every cell with the next 0, 1, 2, 4, ... cells, one after the other, and those numbers."""
    count, index = len(cells.lo), torch.arange(len(cells.lo))
    windows, lengths, length = [cells], [0], 1
    while 4 * length <= count:
        step = max(length // 2, 1)
        windows.append(windows[-1].hull(windows[-1][(index + step).clamp_max(count - 1)]))
        lengths.append(length)
        length *= 2
    return Interval.cat(windows), torch.tensor(lengths)
