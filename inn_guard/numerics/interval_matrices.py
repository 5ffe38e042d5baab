"""Matrices of intervals: products, inverses, spectral norms; Jacobians over a box are such."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inn_guard.numerics.intervals import Interval, down, up_tensor
from inn_guard.numerics.rounding import TINY, Upper, enlarged, gamma
from inn_guard.numerics.spectral_norm import inverse_with_error, spectral_norm

__all__ = [
    "diagonal",
    "interval_inverse",
    "interval_norm",
    "matmul",
    "triangular_inverse",
    "within",
]


def within(centre: Tensor, error: float) -> Interval:
    """Every matrix whose entries differ by no more than ``error`` from those of ``centre``."""
    return Interval(down(centre - error), up_tensor(centre + error))


def diagonal(x: Interval) -> Interval:
    """The matrix with diagonal x (n,)."""
    return x.map(torch.diag)


def matmul(A: Interval, B: Interval) -> Interval:
    """A B, (m, k) times (k, n), both bounded, by centres and radii.

    >>> A = Interval.of(torch.tensor([[1.0, 2.0]]))
    >>> B = Interval(torch.zeros(2, 1).double(), torch.ones(2, 1).double())
    >>> float(matmul(A, B).hi) >= 3.0
    True
    """
    c, d, terms = A.centre, B.centre, A.shape[-1] + 8
    sizes = c.abs() + A.radius, d.abs() + B.radius
    radius = c.abs() @ B.radius + A.radius @ sizes[1]
    rounding = 2 * gamma(terms) * (sizes[0] @ sizes[1])
    # TINY: products of small numbers may underflow
    radius = enlarged(radius + rounding, 2 * terms) + TINY
    product = c @ d
    return Interval(down(product - radius), up_tensor(product + radius))


def interval_inverse(A: Interval) -> Interval:
    """Every inverse of a square matrix in A; everything if one of them may be singular.

    With X the inverse of the centre and ||A - centre|| <= r, ||A^-1 - X|| <= ||X||^2 r / (1 - ||X||
    r).
    """
    X, error = inverse_with_error(A.centre)
    size = spectral_norm(X) + error
    moved = size * spectral_norm(A.radius)
    error = error + size * moved / (1 - moved)
    if not moved < 1 or not math.isfinite(error):
        everything = torch.full_like(X, math.inf)
        return Interval(-everything, everything)
    return within(X, error)


def triangular_inverse(A: Interval) -> Interval:
    """Every inverse of a lower triangular matrix in A, row by row; its diagonal is not zero.

    What stands above the diagonal is taken for zero. In magnitudes this is the inverse of the
    M-matrix diag(least) - |A - diag|.
    """
    n = len(A.lo)
    rows: list[Interval] = []
    reciprocal = diagonal_of(A).reciprocal()
    for i in range(n):
        row = Interval.of(torch.eye(n, dtype=torch.float64)[i : i + 1])
        if i:
            row = row - matmul(A[i : i + 1, :i], Interval.cat(rows))
        rows.append(row * reciprocal[i])
        if not rows[-1].bounded:
            everything = torch.full_like(A.lo, math.inf)
            return Interval(-everything, everything)
    return Interval.cat(rows)


def diagonal_of(A: Interval) -> Interval:
    """The diagonal (n,) of a square matrix."""
    return A.map(torch.diagonal)


def interval_norm(A: Interval) -> tuple[Upper, Tensor, Upper]:
    """A bound of the spectral norm of every matrix in A, and the matrix and the error it is of.

    The least of ||centre|| + ||radius|| and || |A| ||.
    """
    error = spectral_norm(A.radius)
    by_centre, by_size = spectral_norm(A.centre, error), spectral_norm(A.magnitude)
    if by_centre <= by_size:
        return by_centre, A.centre, error
    return by_size, A.magnitude, Upper(0.0)
