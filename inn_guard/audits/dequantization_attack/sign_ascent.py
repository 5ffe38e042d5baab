"""Sign steps uphill that shrink, then draws around their end; subclasses say what is uphill."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inn_guard.audits.dequantization_attack.search import Search

__all__ = ["SignAscent", "Uphill", "unit"]

Uphill = Callable[[Tensor], Tensor]  #: points -> directions uphill, of which the signs count


@dataclass(frozen=True)
class SignAscent(abc.ABC):
    """From a random point of every cube uphill by steps that shrink, then draws around the end.

    Attributes:
        budget: forward-equivalents per sample.
        share: of the budget for the climb; the rest is for the draws.
        first_step: in half-widths of the cube; steps shrink linearly from it to ``last_step``.
        last_step: likewise.
        radius: of the draws, in half-widths.
    """

    budget: float | int = 800.0
    share: float | int = 0.5
    first_step: float | int = 0.25
    last_step: float | int = 0.005
    radius: float | int = 0.02

    measures: ClassVar[str] = "gradient"  #: what a step costs

    @abc.abstractmethod
    def uphill(self, search: Search, start: Tensor) -> Uphill:
        """What gives the directions along the way that begins at ``start``."""

    def run(self, search: Search) -> None:
        """Climb, then draw."""
        cubes, begin = search.cubes, search.spent
        x = cubes.uniform(search.generator)
        slope = self.uphill(search, x)
        climb = self.share * (self.budget - begin)
        while search.spent - begin < climb and search.can_afford(self.measures):
            left = 1 - (search.spent - begin) / climb
            x = cubes.project(
                x + (self.first_step * left + self.last_step) * cubes.half * slope(x).sign()
            )
        while search.can_afford("error"):
            search.errors(x)
            x = cubes.near(x, self.radius, search.generator)


def unit(t: Tensor) -> Tensor:
    """Every sample scaled to length 1; zeros stay."""
    length = t.flatten(1).double().norm(dim=1)
    scale = torch.where(length > 0, length, torch.ones_like(length)).reshape(
        -1, *[1] * (t.dim() - 1)
    )
    return (t.double() / scale).to(t.dtype)
