"""Ascent: average what the noisy gradients agree on, then draw where they lead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.attacks.search import Search

__all__ = ["Ascent", "draw_near", "unit"]


@dataclass(frozen=True)
class Ascent:
    """Sign steps along a running mean of normalised gradients of the error, shrinking; then draws around the end.

    The gradient of the reconstruction error is a signal (where the inverse amplifies more) under rounding noise of
    the same size, drawn afresh at every point. A running mean of directions keeps the first and forgets the second.
    What is left to gain at the end is luck, the rounding errors of one particular point, and luck is had for the
    price of a round trip, half of a gradient's.

    Attributes:
        budget: forward-equivalents per sample.
        share: of the budget for the climb; the rest is for the draws.
        first_step: in half-widths of the cube; steps shrink linearly from it to ``last_step``.
        last_step: likewise.
        momentum: weight of the mean so far.
        radius: of the draws, in half-widths.

    References:
        Boosting Adversarial Attacks with Momentum (Dong et al., 2018).
    """

    budget: float | int = 800.0
    share: float | int = 0.5
    first_step: float | int = 0.25
    last_step: float | int = 0.005
    momentum: float | int = 0.9
    radius: float | int = 0.02

    def hunt(self, search: Search) -> None:
        """Climb, then draw."""
        cubes, begin = search.cubes, search.spent
        x = cubes.uniform(search.generator)
        mean = torch.zeros_like(x)
        climb = self.share * (self.budget - begin)
        while search.spent - begin < climb and search.affords("gradient"):
            left = 1 - (search.spent - begin) / climb
            mean = self.momentum * mean + unit(search.gradient(x).to_x)
            x = cubes.project(x + (self.first_step * left + self.last_step) * cubes.half * mean.sign())
        draw_near(search, x, self.radius)


def draw_near(search: Search, x: Tensor, radius: float) -> None:
    """Spend the rest of the budget on x and on random points within ``radius`` half-widths of it."""
    while search.affords("error"):
        search.errors(x)
        x = search.cubes.near(x, radius, search.generator)


def unit(t: Tensor) -> Tensor:
    """Every sample scaled to length 1; zeros stay."""
    length = t.flatten(1).double().norm(dim=1)
    scale = torch.where(length > 0, length, torch.ones_like(length)).reshape(-1, *[1] * (t.dim() - 1))
    return (t.double() / scale).to(t.dtype)
