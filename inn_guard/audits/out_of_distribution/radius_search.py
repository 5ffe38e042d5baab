"""Radius search: how far from the data a map stays invertible."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Radii", "smallest_failing_radius"]

SMALLEST, LARGEST = -3, 12  #: powers of two that are tried, in units of the data's own radius
BISECTIONS = 6


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


def smallest_failing_radius(fails: Callable[[Tensor], Tensor], count: int) -> Radii:
    """Radii are doubled until one fails, then the last interval is halved on a log scale.

    What fails at a small radius and holds again beyond is found as far as the doubling meets it.

    Args:
        fails: (radii (count,)) -> which of the directions fail there, (count,) bool.
        count: number of directions.

    >>> smallest_failing_radius(lambda r: r > 3.0, 1).fails.item() < 3.1
    True
    """
    holds = torch.zeros(count, dtype=torch.float64)
    broken = torch.full((count,), math.inf, dtype=torch.float64)
    for power in range(SMALLEST, LARGEST + 1):
        radius = torch.full((count,), 2.0**power, dtype=torch.float64)
        failing = fails(radius) & broken.isinf()
        broken = torch.where(failing, radius, broken)
        holds = torch.where(broken.isinf(), radius, holds)
        if not bool(broken.isinf().any()):
            break
    searched = broken.isfinite() & (holds > 0)
    for _ in range(BISECTIONS if bool(searched.any()) else 0):
        middle = torch.where(searched, (holds * broken).sqrt(), holds)
        failing = fails(middle) & searched
        broken = torch.where(failing, middle, broken)
        holds = torch.where(searched & ~failing, middle, holds)
    return Radii(holds, broken, 2.0**LARGEST)
