"""Neighbourhoods of a point, and what a map does to one to first order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inn_guard.lipschitz.networks.conditioner import Directions
from inn_guard.lipschitz.networks.interpreters import Columns
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper

__all__ = ["Moved", "Neighbourhood", "moved_by_slopes"]


@dataclass(frozen=True)
class Neighbourhood:
    """States x = centre + P d, for all d in a set of directions.

    Attributes:
        centre: a state, (*shape).
        columns: P, column by column, (n, *shape), exactly.
        directions: the set.
        box: holds the states, too.
    """

    centre: Tensor
    columns: Tensor
    directions: Directions
    box: Interval

    @property
    def point(self) -> Interval:
        """The centre as an interval."""
        return Interval.of(self.centre)

    def range(self) -> Interval:
        """A box of the states and the centre."""
        radius = self.directions.radius.reshape(-1, *[1] * (self.columns.dim() - 1))
        sums = (radius * self.columns.abs()).sum(0)
        moved = self.directions.spread(sums, self.columns.square().sum(0), Upper(0.0))
        # the centre is rounded, and lines from it to the states count
        return self.box.meet(self.point + Interval(-moved, moved)).hull(self.point)


@dataclass(frozen=True)
class Moved:
    """A neighbourhood behind a map F, and the distance of derivatives from a matrix C.

    Attributes:
        centre: encloses the image of the centre.
        columns: C P, with their rounding error.
        forward: bounds ||J(x) - C|| over the neighbourhood.
        inverse: bounds ||J(x)^-1 - C^-1||.
        is_isometry: whether C is orthogonal.
    """

    centre: Interval
    columns: Columns
    forward: Upper
    inverse: Upper
    is_isometry: bool = False


def moved_by_slopes(around: Neighbourhood, centre: Interval, slopes: Interval) -> Moved:
    """Behind an entrywise map of derivatives in ``slopes``."""
    reference = slopes.centre
    columns = Columns(around.columns, Upper(0.0)).moved(
        around.columns * reference, Upper(float(reference.abs().max())), 2
    )
    apart = (slopes - reference).magnitude.max()
    inverse_apart = (slopes.reciprocal() - Interval.of(reference).reciprocal()).magnitude.max()
    return Moved(centre, columns, Upper(float(apart)), Upper(float(inverse_apart)))
