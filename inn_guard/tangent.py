"""The four linear maps of one differentiable layer at one batch, by autograd.

Every sample b of a batch x (B, *data) has its own Jacobian J_b. A tangent applies it, its transpose, its inverse and
its inverse transpose to one vector per sample, without forming a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import forward_ad

Map = Callable[[Tensor], Tensor]


class NotApplicable(NotImplementedError):
    """A question that a model cannot answer, with the reason. `audit()` turns it into a verdict of that name."""


@runtime_checkable
class Tangent(Protocol):
    """The linear maps of z = F(x) at a batch x, one vector per sample each.

    Attributes:
        output: F(x), shape (B, *latent), detached.
    """

    output: Tensor

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (B, *data) -> (B, *latent)."""
        ...

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (B, *latent) -> (B, *data)."""
        ...

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u: (B, *latent) -> (B, *data)."""
        ...

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v: (B, *data) -> (B, *latent)."""
        ...


class _Recorded:
    """A map at one point with its graph kept, so that each J^T u costs one backward pass and each J v one forward."""

    def __init__(self, function: Map, point: Tensor) -> None:
        self.function = function
        self.leaf = point.detach().clone().requires_grad_()
        with torch.enable_grad():
            self.value = function(self.leaf.clone())  # a map that writes into its input may not write into a leaf

    def pull(self, u: Tensor) -> Tensor:
        """J^T u; with one more leading dimension than the value, all of its rows in one batched call."""
        if not self.value.requires_grad:
            raise NotApplicable("the map has no derivative: its output does not depend on its input through autograd")
        batched = u.dim() > self.value.dim()
        (gradient,) = torch.autograd.grad(
            self.value, self.leaf, u, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        if gradient is None:
            raise NotApplicable("the map has no derivative: autograd found no path from its output to its input")
        return gradient

    def push(self, v: Tensor) -> Tensor:
        """J v by forward-mode differentiation."""
        with forward_ad.dual_level(), torch.enable_grad():
            dual = forward_ad.make_dual(self.leaf.detach().clone(), v)
            tangent = forward_ad.unpack_dual(self.function(dual)).tangent
        if tangent is None:
            raise NotApplicable("the map has no forward-mode derivative")
        return tangent.detach()


class AutogradTangent:
    """The four maps of a layer given as two callables: forward at x, and inverse at the stored output F(x).

    The inverse is evaluated at most once per call, at F(x) of this one layer, never at a state that came out of a
    numerical inverse further down the chain.
    """

    def __init__(self, forward: Map, inverse: Map, x: Tensor) -> None:
        self._forward = _Recorded(forward, x)
        self._inverse_map = inverse
        self._inverse: _Recorded | None = None
        self.output = self._forward.value.detach()

    @property
    def _backward(self) -> _Recorded:
        if self._inverse is None:
            self._inverse = _Recorded(self._inverse_map, self.output)
        return self._inverse

    def jvp(self, v: Tensor) -> Tensor:
        """J v by forward mode."""
        return self._forward.push(v)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u by reverse mode; u may carry one leading dimension of rows."""
        return self._forward.pull(u)

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u by forward mode through the inverse."""
        return self._backward.push(u)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v by reverse mode through the inverse."""
        return self._backward.pull(v)
