"""The attack of the exploding-inverses paper: projected gradient ascent on the error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from inn_guard.audits.dequantization_attack.search import ErrorGradient, Search

__all__ = ["ProjectedGradient"]


@dataclass(frozen=True)
class ProjectedGradient:
    """x <- Proj(x + step_size sign(grad |x - F^-1(F(x))|)) from a random start, as in the paper.

    One step costs F, F^-1 and their two vector-Jacobian products: the error that the step reports
    is that of the point before it, which the pass computes anyway; one round trip at the end
    measures the last point.

    Where the round trip is exact up to rounding, so is J^T J^-T = I, and the gradient is noise to
    first order; it knows a direction as far as the error itself is large enough to bend the map.

    Attributes:
        steps: from every start.
        step_size: in units of high - low of the normalisation.
        restarts: random starts, one after the other; those of ``Restarts`` are shared over
            processes.
        budget: forward-equivalents per sample that end the search early.
        gradient: ``Search.gradient`` (autograd through the inverse, whatever it is) or
            ``Search.implicit_gradient`` (the implicit function theorem, for fixed-point
            iterations).

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), appendix E. This differs from the paper in: the upper
        faces belong to the next cube and are left out, by one unit in the last place; broken
        samples stop at once.
    """

    steps: int = 200
    step_size: float | int = 5e-4
    restarts: int = 1
    budget: float | int = math.inf
    gradient: Callable[[Search, Tensor], ErrorGradient] = Search.gradient

    def run(self, search: Search) -> None:
        """Climb from every start."""
        kind = "implicit gradient" if self.gradient is Search.implicit_gradient else "gradient"
        cubes = search.cubes
        for _ in range(self.restarts):
            x = cubes.uniform(search.generator)
            for _ in range(self.steps):
                if not search.can_afford(kind):
                    break
                pulled = self.gradient(search, x)
                x = cubes.project(x + self.step_size * cubes.span * pulled.to_x.sign())
            if not search.can_afford("error"):
                return
            search.errors(x)
