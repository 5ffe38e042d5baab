"""Tangents that need no network: of linear maps and of elementwise ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChannelMixingJacobian", "ElementwiseTangent", "LinearTangent", "PermutationJacobian"]

Product = Callable[[Tensor], Tensor]

CHUNK = 2**18  #: entries that are multiplied at once, so that they stay in a cache


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
    shape: torch.Size  #: of x, (B, *data)

    def multiply(self, matrix: Tensor) -> Tensor:
        """A M for a matrix M (dim x, K), at a batch of one."""
        columns = self.jvp(matrix.T.reshape(-1, *self.shape))
        return columns.reshape(len(columns), -1).T.contiguous()


@dataclass
class ChannelMixingJacobian(LinearTangent):
    """The tangent of a matrix applied to the channels."""

    weight: Tensor

    def select(self, rows: Tensor) -> ChannelMixingJacobian:
        """The same products; the output of these rows."""
        return dataclasses.replace(self, output=self.output[rows])

    def multiply(self, matrix: Tensor) -> Tensor:
        """The weight applied to the channels of every column; in place, so that no second large matrix is needed."""
        matrix = matrix.contiguous()
        for columns in matrix.view(len(self.weight), -1).split(
            max(1, CHUNK // len(self.weight)), dim=1
        ):
            columns.copy_(self.weight @ columns)
        return matrix


@dataclass
class PermutationJacobian(LinearTangent):
    """The tangent of a map that moves entries only: z_i = x_rows(i), counted through one sample."""

    rows: Tensor

    def select(self, rows: Tensor) -> PermutationJacobian:
        """The same products; the output of these rows."""
        return dataclasses.replace(self, output=self.output[rows])

    def multiply(self, matrix: Tensor) -> Tensor:
        """The rows in their new order."""
        return matrix.index_select(0, self.rows)


class ElementwiseTangent:
    """The tangent of an elementwise map: multiplication with its derivative, or division by it.

    Args:
        output: F(x).
        derivative: F'(x), of a shape that broadcasts to x's.
    """

    def __init__(self, output: Tensor, derivative: Tensor) -> None:
        self.output, self.derivative = output.detach(), derivative.detach()

    def select(self, rows: Tensor) -> ElementwiseTangent:
        """The derivative at these rows."""
        per_sample = self.derivative.dim() == self.output.dim() and len(self.derivative) == len(
            self.output
        )
        return ElementwiseTangent(
            self.output[rows], self.derivative[rows] if per_sample else self.derivative
        )

    def multiply(self, matrix: Tensor) -> Tensor:
        """The rows of a matrix (dim x, K), each with its derivative, at a batch of one; in place."""
        return matrix.mul_(self.derivative.expand_as(self.output).reshape(-1, 1))

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
