"""Fixed points of contractions, with a record of whether the iteration converged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inn_guard.core.layer_jacobian import Map
from inn_guard.core.missing import NotApplicable

__all__ = ["Convergence", "FixedPoint", "implicit_gradient"]


@dataclass
class Convergence:
    """How the last iteration ended.

    Attributes:
        iterations: number of evaluations of the map.
        residual: |T(x) - x| of each sample at the last evaluation, relative to the larger of |x|
            and |start|, (B,).
        converged: whether it is below the tolerance, (B,); empty if there was no iteration yet.
    """

    iterations: int = 0
    residual: Tensor = field(default_factory=lambda: torch.empty(0))
    converged: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))


@dataclass(frozen=True)
class FixedPoint:
    """x = T(x) by iteration until |T(x) - x| <= tolerance eps max(|x|, |start|) for every sample.

    Args:
        tolerance: in units of the dtype's rounding error eps.
        max_iterations: the iteration ends there at the latest; the record then says that it has not
            converged.
    """

    tolerance: float = 16.0
    max_iterations: int = 1000

    @torch.no_grad()
    def solve(self, function: Map, start: Tensor) -> tuple[Tensor, Convergence]:
        """The fixed point next to ``start`` (B, *), and how the iteration ended.

        A sample that is no longer finite counts as not converged and does not keep the iteration
        going.
        """
        x = start
        threshold = self.tolerance * torch.finfo(start.dtype).eps
        # the start's length keeps the residual meaningful where the fixed point is zero
        least = _norms(start).clamp(min=torch.finfo(start.dtype).tiny)
        record = Convergence()
        for iteration in range(1, self.max_iterations + 1):
            image = function(x)
            residual = _norms(image - x) / torch.maximum(_norms(image), least)
            record = Convergence(iteration, residual, residual <= threshold)
            x = image
            if bool((record.converged | ~residual.isfinite()).all()):
                break
        return x, record


def _norms(x: Tensor) -> Tensor:
    # in the dtype of x, which is faster than core's float64 and enough for a stopping rule
    return x.flatten(1).norm(dim=1)


def implicit_gradient(x: Tensor, pull_through: Map) -> Tensor:
    """x itself; in the backward pass its gradient is replaced by ``pull_through(gradient)``.

    With x = z - g(x*) attached to z and to the parameters of g, and x* detached, ``pull_through``
    must apply (I + G)^-T, G = dg/dx: that is the gradient of the solution of x + g(x) = z by the
    implicit function theorem. It can be differentiated once; a second time raises an error.
    """
    return _ImplicitGradient.apply(x, pull_through)


class _ImplicitGradient(torch.autograd.Function):
    """The identity, whose gradient is ``pull_through(gradient)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pull_through: Map) -> Tensor:
        ctx.pull_through = pull_through
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            solved = ctx.pull_through(gradient)
        # the solution depends on x and on the gradient: a second derivative must raise
        return _Undifferentiable.apply(solved, *ctx.saved_tensors, gradient), None


class _Undifferentiable(torch.autograd.Function):
    """The identity; differentiating it raises NotApplicable."""

    @staticmethod
    def forward(ctx: Any, solved: Tensor, *_: Tensor) -> Tensor:
        return solved.view_as(solved)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotApplicable(
            "the inverse of an invertible residual layer can be differentiated once, not twice; "
            "differentiate its forward map instead"
        )
