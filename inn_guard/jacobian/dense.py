"""Dense Jacobians composed layer by layer: J = J_n ... J_1, every factor multiplied with the product so far.

A coupling layer's factor is the identity but for one dense block, a permutation moves rows, a 1x1 convolution mixes
them: for deep nets this takes a fraction of the operations of one pass through the net per row.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.allocator import retain_freed_memory
from inn_guard.jacobian.checks import dense_jacobian

__all__ = ["DenseFactor", "composed_jacobian", "is_composable"]


@runtime_checkable
class DenseFactor(Protocol):
    """A tangent at one sample that multiplies its Jacobian with a whole matrix."""

    def multiply(self, matrix: Tensor) -> Tensor:
        """J M: (dim x, K) -> (dim z, K); M may be overwritten."""
        ...


def composed_jacobian(
    model: Invertible, x: Float[Tensor, "batch *data"], *, columns: range | None = None
) -> Float[Tensor, "batch latent columns"]:
    """The Jacobian of every sample, (B, dim z, dim x), in the dtype of x.

    Layers whose tangent cannot multiply a matrix are differentiated row by row on their own and multiplied as dense
    matrices. Takes O(D^3) operations per layer at most.

    Args:
        model: the map; a model without layers() is one layer.
        x: where.
        columns: these alone, (B, dim z, len(columns)); all of them unless given.
    """
    retain_freed_memory()
    columns = range(math.prod(x.shape[1:])) if columns is None else columns
    jacobians = []
    for b in range(len(x)):
        row = torch.tensor([b], device=x.device)
        jacobians.append(_of_one(model.select(row), x[b : b + 1].detach(), columns))
    if not jacobians:
        raise ValueError(f"expected at least one sample, got {tuple(x.shape)}")
    return torch.stack(jacobians)


def is_composable(model: Invertible, x: Float[Tensor, "batch *data"]) -> bool:
    """Whether every layer multiplies its Jacobian with a matrix by itself, so that composing is the faster way."""
    for layer in model.layers() or (model,):
        tangent = layer.linearize(x)
        if not isinstance(tangent, DenseFactor):
            return False
        x = tangent.output
    return True


def _of_one(model: Invertible, x: Tensor, columns: range) -> Tensor:
    J = x.new_zeros(math.prod(x.shape[1:]), len(columns))
    J[columns, range(len(columns))] = 1
    for layer in model.layers() or (model,):
        tangent = layer.linearize(x)
        with torch.no_grad():
            J = (
                tangent.multiply(J)
                if isinstance(tangent, DenseFactor)
                else dense_jacobian(tangent, x)[0] @ J
            )
        x = tangent.output
    return J
