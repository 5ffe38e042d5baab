"""Gradient-free ascent, for inverses that are iterative, random or not differentiable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inn_guard.audits.dequantization_attack.search import Search
from inn_guard.audits.dequantization_attack.sign_ascent import SignAscent, Uphill

__all__ = ["GradientFree"]


@dataclass(frozen=True)
class GradientFree(SignAscent):
    """Simultaneous perturbations: log errors at x + c d and x - c d, averaged over random signs d.

    Its directions are so noisy that it takes small steps.

    Attributes:
        momentum: weight of the mean of directions so far.
        spread: c, in half-widths.

    References:
        Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
        Approximation (Spall, 1992).
    """

    first_step: float | int = 0.25
    last_step: float | int = 0.005
    momentum: float | int = 0.95
    spread: float | int = 0.5

    measures: ClassVar[str] = "error"

    def uphill(self, search: Search, start: Tensor) -> Uphill:
        """The mean so far of the random signs, each weighted with how the error grew along them."""
        cubes, mean = search.cubes, torch.zeros_like(start)

        def slope(x: Tensor) -> Tensor:
            nonlocal mean
            signs = _signs(x, search.generator)
            above, below = (
                search.errors(cubes.project(x + c * cubes.half * signs))
                for c in (self.spread, -self.spread)
            )
            growth = _log_ratio(above, below).to(x).reshape(-1, *[1] * (x.dim() - 1))
            mean = self.momentum * mean + growth * signs
            return mean

        return slope


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(2, like.shape, generator=generator, device="cpu") - 1).to(like)


def _log_ratio(above: Tensor, below: Tensor) -> Tensor:
    """ln above / below; 0 where either is not finite or both are 0."""
    ratio = above.log() - below.log()
    return torch.where(ratio.isfinite(), ratio, torch.zeros_like(ratio))
