"""Tables of a scalar function's values, derivatives and second derivatives, looked up for affine forms."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inn_guard.lipschitz.affine_forms import AffineForm
from inn_guard.lipschitz.intervals import Interval
from inn_guard.lipschitz.jets import Jet, Jets

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

    Args:
        jets: the function.
        low: left end of the grid.
        high: right end; of what leaves the grid nothing is known.
        cells: number of cells.
        groups: the outputs are so many groups of equal length, of which queries take one.
    """

    def __init__(self, jets: Jets, low: float, high: float, *, cells: int, groups: int = 1) -> None:
        margin = 1e-6 * (high - low)  # forms that end where the grid does end a little beyond
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
        bends, self.reach = _windows(Interval.cat([j.bend[:, 0] for j in found if j.bend is not None]), self.width)
        self.bends = self._rows(bends.centre, bends.radius)

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
        window = torch.bucketize(offset.size, self.reach)
        inside = (window < len(self.reach)) & (u.range.lo >= self.low) & (u.range.hi <= self.high)
        window = window.clamp_max(len(self.reach) - 1)
        row = torch.zeros_like(cell) if group is None else group
        value, rate = self._taken(self.points, cell * self.groups + row)
        bend, error = self._taken(self.bends, (window * len(self.middle) + cell) * self.groups + row)
        away, offset = offset.size, offset[None]
        away = torch.where(inside, away, math.inf)
        moved = offset * rate + offset.square() * (0.5 * bend) + value
        return Curve(
            moved.widened(0.5 * error * away.square() + self.error * (1 + away)),
            (offset * bend + rate).widened(error * away + self.error),
        )

    def _taken(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        first, second = rows.index_select(0, index).T.contiguous().chunk(2)
        return first, second


def _thin(jet: Jet) -> tuple[Interval, Interval]:
    if jet.bend is None:
        raise ValueError("expected a function of one input")
    return jet.centre, jet.rate[:, 0]


def _windows(cells: Interval, width: float) -> tuple[Interval, Tensor]:
    """Hulls over 0, 1, 2, 4, ... cells to both sides of each, one after the other, and how far each reaches."""
    count, index = len(cells.lo), torch.arange(len(cells.lo))
    windows, reach, side = [cells], [0], 1
    while 4 * side <= count:
        last, step = windows[-1], max(side // 2, 1)
        left, right = last[(index - step).clamp_min(0)], last[(index + step).clamp_max(count - 1)]
        windows.append(left.hull(right).hull(last))
        reach.append(side)
        side *= 2
    # a little less, for the rounding of the edges
    return Interval.cat(windows), (torch.tensor(reach, dtype=torch.float64) + 0.5) * width * (1 - 1e-9)
