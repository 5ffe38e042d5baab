"""J^-1 of a layer by factorising its dense Jacobian, computed with few and large products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.layer_jacobian import Selectable
from inn_guard.jacobian.network_products import NetworkJacobian

__all__ = ["Factored", "factored"]

MAX_ENTRIES = 2**27  #: of the Jacobians of all samples together: 1 GiB in float64
ROWS_AT_ONCE = 1024  #: products that are computed together


@dataclass(frozen=True)
class _PivotedTriangular:
    """J = P L U for each sample: L and U in one matrix (B, D, D), and the pivots (B, D)."""

    factors: Tensor
    pivots: Tensor

    def select(self, rows: Tensor) -> _PivotedTriangular:
        return _PivotedTriangular(self.factors[rows], self.pivots[rows])

    def solution(self, columns: Tensor, *, adjoint: bool) -> Tensor:
        return torch.linalg.lu_solve(self.factors, self.pivots, columns, adjoint=adjoint)


@dataclass(frozen=True)
class _Triangular:
    """J that is triangular itself, as of an autoregressive layer in the order of its features."""

    factors: Tensor
    upper: bool

    def select(self, rows: Tensor) -> _Triangular:
        return _Triangular(self.factors[rows], self.upper)

    def solution(self, columns: Tensor, *, adjoint: bool) -> Tensor:
        matrix = self.factors.mT if adjoint else self.factors
        return torch.linalg.solve_triangular(matrix, columns, upper=self.upper != adjoint)


class Factored:
    """J^-1 by triangular matrices.

    Args:
        factors: of J, one for each sample.
        shape: of what J maps from, without the batch.
    """

    def __init__(self, factors: _PivotedTriangular | _Triangular, shape: torch.Size) -> None:
        self._factors, self._shape = factors, shape
        self.batch = len(factors.factors)

    def select(self, rows: Tensor) -> Factored:
        """J^-1 of these samples."""
        return Factored(self._factors.select(rows), self._shape)

    def in_dtype(self, dtype: torch.dtype) -> None:
        """None: it has no large products."""
        return

    def run(self, u: Tensor) -> Tensor:
        """J^-1 u: (B, *latent) -> (B, *data)."""
        return self._solution(u, adjoint=False)

    def run_transposed(self, v: Tensor) -> Tensor:
        """J^-T v: (B, *data) -> (B, *latent), in the shape of v."""
        return self._solution(v, adjoint=True)

    def _solution(self, right: Tensor, *, adjoint: bool) -> Tensor:
        columns = right.flatten(1).unsqueeze(2)
        solution = self._factors.solution(columns, adjoint=adjoint)
        return solution.reshape(len(right), *self._shape)


def factored(jacobian: NetworkJacobian) -> Factored | None:
    """J^-1 by factorising a dense J; None where J is too large, not square, or not selectable.

    Samples must be selectable, so that one product computes many rows of J.
    """
    output = jacobian.output
    batch, size = len(output), output[0].numel()
    if batch * size * size > MAX_ENTRIES or not isinstance(jacobian, Selectable):
        return None
    at_once = max(1, ROWS_AT_ONCE // batch)
    wide = jacobian.select(torch.arange(batch, device=output.device).repeat(at_once))
    if wide is None:
        return None
    rows = []
    for first in range(0, size, at_once):
        numbers = torch.arange(min(at_once, size - first), device=output.device)
        basis = output.new_zeros(at_once, batch, size)
        basis[numbers, :, first + numbers] = 1
        part = wide.vjp(basis.view(at_once * batch, *output.shape[1:]))
        rows.append(part.reshape(at_once, batch, -1)[: len(numbers)])
    dense = torch.cat(rows).transpose(0, 1)
    if dense.shape[1] != dense.shape[2] or part.shape[1:] != output.shape[1:]:
        return None
    for upper in (False, True):
        other_side = dense.tril(-1) if upper else dense.triu(1)
        if not bool(other_side.any()):
            return Factored(_Triangular(dense.contiguous(), upper), output.shape[1:])
    # an exactly singular J is found by the checks of J^-1
    factors, pivots, _ = torch.linalg.lu_factor_ex(dense.double())
    return Factored(_PivotedTriangular(factors.to(output.dtype), pivots), output.shape[1:])
