"""Gradient-free ascent, for inverses that are iterative, random or not differentiable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.attacks.ascent import draw_near
from inn_guard.audits.attacks.search import Search

__all__ = ["GradientFree"]


@dataclass(frozen=True)
class GradientFree:
    """Simultaneous perturbations: log error at x + c d and at x - c d, d of random signs, averaged over directions.

    Attributes:
        budget: forward-equivalents per sample.
        share: of the budget for the climb; the rest is for draws around its end.
        first_step: in half-widths; steps shrink linearly from it to ``last_step``.
        last_step: likewise.
        momentum: weight of the mean of directions so far.
        spread: c, in half-widths.
        radius: of the draws, in half-widths.

    References:
        Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation (Spall, 1992).
    """

    budget: float | int = 800.0
    share: float | int = 0.5
    first_step: float | int = 0.25
    last_step: float | int = 0.005
    momentum: float | int = 0.95
    spread: float | int = 0.5
    radius: float | int = 0.02

    def hunt(self, search: Search) -> None:
        """Climb, then draw."""
        cubes, begin = search.cubes, search.spent
        x = cubes.uniform(search.generator)
        mean = torch.zeros_like(x)
        climb = self.share * (self.budget - begin)
        while search.spent - begin < climb and search.affords("error"):
            left = 1 - (search.spent - begin) / climb
            signs = _signs(x, search.generator)
            above, below = (
                search.errors(cubes.project(x + c * cubes.half * signs)) for c in (self.spread, -self.spread)
            )
            slope = _log_ratio(above, below).to(x).reshape(-1, *[1] * (x.dim() - 1))
            mean = self.momentum * mean + slope * signs
            x = cubes.project(x + (self.first_step * left + self.last_step) * cubes.half * mean.sign())
        draw_near(search, x, self.radius)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(2, like.shape, generator=generator, device="cpu") - 1).to(like)


def _log_ratio(above: Tensor, below: Tensor) -> Tensor:
    """ln above / below; 0 where either is not finite or both are 0."""
    ratio = above.log() - below.log()
    return torch.where(ratio.isfinite(), ratio, torch.zeros_like(ratio))
