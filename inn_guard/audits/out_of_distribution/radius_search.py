"""Radius search: how far from the data a map stays invertible."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Radii", "smallest_failing_radii"]

#: radii (P, n) -> (things, P, n) bool
Fails = Callable[[Tensor], Tensor]

SMALLEST, LARGEST = -3, 12  #: powers of two that are tried, in units of the data's own radius
BISECTIONS = 6
TOGETHER = 3  #: radii of each thing that two halvings with one call look at


@dataclass(frozen=True)
class Radii:
    """Where something first fails along each direction, in units of the data's radius.

    Attributes:
        holds: the largest radius up to which it was seen to hold, (n,) float64; 0 if it failed
            everywhere.
        fails: the smallest radius at which it was seen to fail, (n,); inf where it held up to
            ``limit``.
        limit: the largest radius tried.
    """

    holds: Tensor
    fails: Tensor
    limit: float

    @property
    def smallest(self) -> float:
        """The smallest failing radius over all directions; inf if none failed."""
        return self.fails.min().item()


def smallest_failing_radii(fails: Fails, count: int, *, at_once: int = 1) -> list[Radii]:
    """Radii are doubled until one fails, then the last interval is halved on a log scale.

    What fails at a small radius and holds again beyond is found as far as the doubling meets it.

    Args:
        fails: radii (P, count) -> for each thing that may fail, which of the directions fail there,
            (things, P, count) bool.
        count: number of directions.
        at_once: how many radii of a direction may be handed in together.

    Returns:
        for each thing, where it fails.

    >>> (radii,) = smallest_failing_radii(lambda r: r[None] > 3.0, 1)
    >>> radii.fails.item() < 3.1
    True
    """
    powers = 2.0 ** torch.arange(SMALLEST, LARGEST + 1, dtype=torch.float64)
    holds = torch.zeros(1, count, dtype=torch.float64)
    broken = torch.full_like(holds, math.inf)
    for part in powers.split(at_once):
        found = fails(part[:, None].expand(-1, count))
        for radius, failing in zip(part, found.unbind(1), strict=True):
            broken = torch.where(failing & broken.isinf(), radius, broken)
            holds = torch.where(broken.isinf(), radius, holds)
        if not bool(broken.isinf().any()):
            break
    searched = broken.isfinite() & (holds > 0)

    def failing_at(radii: list[Tensor]) -> list[Tensor]:
        """Whether each thing fails at its own radii, (things, count), for each entry."""
        points = torch.cat(radii)
        things = torch.arange(len(holds)).repeat(len(radii))
        parts = zip(points.split(at_once), things.split(at_once), strict=True)
        found = [fails(part)[thing, range(len(thing))] for part, thing in parts]
        return list(torch.cat(found).split(len(holds)))

    left = BISECTIONS if bool(searched.any()) else 0
    while left:
        middle = torch.where(searched, (holds * broken).sqrt(), holds)
        radii = [middle]
        if at_once >= TOGETHER * len(holds) and left > 1:
            # where the next halving may ask, in the same call
            for quarter in (holds * middle, middle * broken):
                radii.append(torch.where(searched, quarter.sqrt(), middle))
        failing, *next_failing = failing_at(radii)
        broken = torch.where(failing & searched, middle, broken)
        holds = torch.where(searched & ~failing, middle, holds)
        left -= 1
        if next_failing:
            middle = torch.where(failing, radii[1], radii[2])
            below, above = next_failing
            failing = torch.where(failing, below, above)
            broken = torch.where(failing & searched, middle, broken)
            holds = torch.where(searched & ~failing, middle, holds)
            left -= 1
    return [Radii(*ends, 2.0**LARGEST) for ends in zip(holds, broken, strict=True)]
