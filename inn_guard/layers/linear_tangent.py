"""Tangents that need no network: of linear maps and of elementwise ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["ElementwiseTangent", "LinearTangent"]

Product = Callable[[Tensor], Tensor]


@dataclass
class LinearTangent:
    """The tangent of z = A x + b: the four products with A, the same at every x.

    Vectors may carry leading dimensions more than x.
    """

    output: Tensor
    jvp: Product
    vjp: Product
    inverse_jvp: Product
    inverse_vjp: Product


class ElementwiseTangent:
    """The tangent of an elementwise map: multiplication with its derivative, or division by it.

    Args:
        output: F(x).
        derivative: F'(x), of a shape that broadcasts to x's.
    """

    def __init__(self, output: Tensor, derivative: Tensor) -> None:
        self.output, self.derivative = output.detach(), derivative.detach()

    def jvp(self, v: Tensor) -> Tensor:
        """F' v."""
        return v * self.derivative

    def vjp(self, u: Tensor) -> Tensor:
        """F' u."""
        return u * self.derivative

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """u / F'."""
        return u / self.derivative

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """v / F'."""
        return v / self.derivative
