"""Dense Jacobians of a chain: J = J_n ... J_1, each factor multiplied with the product so far.

The factor of a coupling layer is the identity but for one dense block, a permutation moves rows, a
1x1 convolution mixes them. For deep nets this needs a fraction of the operations of one pass
through the net per row.
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
    """A LayerJacobian of one sample that multiplies J with a whole matrix."""

    def multiply(self, matrix: Tensor) -> Tensor:
        """J M: (dim x, K) -> (dim z, K); M may be overwritten."""
        ...


def composed_jacobian(
    model: Invertible, x: Float[Tensor, "batch *data"], *, columns: range | None = None
) -> Float[Tensor, "batch latent columns"]:
    """The Jacobian of every sample, (B, dim z, len(columns)), in the dtype of x.

    A layer that cannot multiply a matrix is differentiated row by row and multiplied as a dense
    matrix. Takes O(D^3) operations per layer at most.

    Args:
        model: the map; a model without layers() counts as one layer.
        x: where, (B, *data).
        columns: the columns to be computed. Default: all of them.

    Raises:
        ValueError: if x has no samples.
    """
    if not len(x):
        raise ValueError(f"expected at least one sample, got x of shape {tuple(x.shape)}")
    retain_freed_memory()
    if columns is None:
        columns = range(math.prod(x.shape[1:]))
    jacobians = []
    for b in range(len(x)):
        row = torch.tensor([b], device=x.device)
        jacobians.append(_of_one_sample(model.select(row), x[b : b + 1].detach(), columns))
    return torch.stack(jacobians)


def is_composable(model: Invertible, x: Float[Tensor, "batch *data"]) -> bool:
    """Whether every layer multiplies J with a matrix itself, which makes composing faster.

    Args:
        model: the map; a model without layers() counts as one layer.
        x: a batch to linearise the layers at, (B, *data).
    """
    for layer in model.layers() or (model,):
        jacobian = layer.linearize(x)
        if not isinstance(jacobian, DenseFactor):
            return False
        x = jacobian.output
    return True


def _of_one_sample(model: Invertible, x: Tensor, columns: range) -> Tensor:
    """These columns of the Jacobian at x (1, *data): (dim z, len(columns))."""
    J = x.new_zeros(math.prod(x.shape[1:]), len(columns))
    J[columns, range(len(columns))] = 1
    for layer in model.layers() or (model,):
        jacobian = layer.linearize(x)
        with torch.no_grad():
            if isinstance(jacobian, DenseFactor):
                J = jacobian.multiply(J)
            else:
                J = dense_jacobian(jacobian, x)[0] @ J
        x = jacobian.output
    return J
