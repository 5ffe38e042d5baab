"""Radius search: how far from the data a map stays invertible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Radii", "smallest_failing_radii"]

#: radii (P, n) -> (things, P, n) bool
Fails = Callable[[Tensor], Tensor]

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
    things = torch.arange(len(broken))
    searched = broken.isfinite() & (holds > 0)
    for _ in range(BISECTIONS if bool(searched.any()) else 0):
        middle = torch.where(searched, (holds * broken).sqrt(), holds)
        # every thing at its own radii
        failing = torch.cat(
            [fails(part)[rows, range(len(rows))] for part, rows in _parts(middle, things, at_once)]
        )
        broken = torch.where(failing & searched, middle, broken)
        holds = torch.where(searched & ~failing, middle, holds)
    return [Radii(*ends, 2.0**LARGEST) for ends in zip(holds, broken, strict=True)]


def _parts(middle: Tensor, things: Tensor, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(middle.split(at_once), things.split(at_once), strict=True)
