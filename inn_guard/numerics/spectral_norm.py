"""Certified spectral norms of matrices and of their inverses."""

from __future__ import annotations

import math

import torch
from jaxtyping import Num
from torch import Tensor

from inn_guard.numerics.rounding import (
    UNIT,
    Upper,
    frobenius_norm,
    gamma,
    gamma_of,
    is_finite,
    largest_eigenvalue,
    power_of_two,
)

__all__ = [
    "cheap_norm",
    "exact",
    "inverse_norm",
    "inverse_with_error",
    "norm_operations",
    "spectral_norm",
]


def spectral_norm(matrix: Num[Tensor, "*batch m n"], error: float = 0.0) -> Upper:
    """A certified upper bound of the spectral norm, the largest over the batch.

    ||A||^2 <= lmax(fl(A^H A)) + gamma ||A||_F^2, the first by Cholesky with outward rounding.

    Args:
        matrix: A, real or complex of any precision; its entries are taken as exact.
        error: bound of the Frobenius norm of the unknown part of A, added to the result.

    Returns:
        sigma_max(A) or a little more (excess about n u); inf if an entry is not finite.

    >>> A = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    >>> 5.0 <= spectral_norm(A) < 5.0 + 1e-13
    True

    References:
        Verification of Positive Definiteness, Rump, 2006.
    """
    if matrix.numel() == 0 or not bool((matrix != 0).any()):
        return Upper(error)
    A = exact(matrix).reshape(-1, *matrix.shape[-2:])
    if not is_finite(A):
        return Upper(math.inf)
    if A.shape[1] < A.shape[2]:
        A = A.mT
    scale = power_of_two(A)
    A = A / scale
    frobenius = frobenius_norm(A)
    square = largest_eigenvalue(A.mH @ A) + gamma_of(A, A.shape[1] + 2) * frobenius * frobenius
    return square.sqrt() * scale + error


def norm_operations(rows: int, columns: int) -> float:
    """About how many floating-point operations ``spectral_norm`` takes for one real matrix."""
    small = min(rows, columns)
    return 2.0 * rows * columns * small + 20.0 * small**3


def cheap_norm(matrix: Num[Tensor, "m n"]) -> Upper:
    """An upper bound of the spectral norm in one pass: sqrt(largest row sum * largest column sum).

    >>> cheap_norm(torch.eye(3)) >= 1.0
    True
    """
    if matrix.numel() == 0:
        return Upper(0.0)
    size = exact(matrix).abs()
    operations = 2 * sum(size.shape) + 4
    columns = Upper.computed(float(size.sum(0).max()), operations)
    rows = Upper.computed(float(size.sum(1).max()), operations)
    return columns.sqrt() * rows.sqrt()


def inverse_norm(matrix: Num[Tensor, "m n"]) -> Upper:
    """A certified upper bound of ||W^-1||_2: ||X|| / (1 - ||I - X W||), X an approximate inverse.

    Args:
        matrix: W, square, entries taken as exact.

    Returns:
        1 / sigma_min(W) or a little more; inf if W is singular to working precision.

    Raises:
        ValueError: if W is not square.

    >>> 0.5 <= inverse_norm(torch.diag(torch.tensor([2.0, 4.0]))) < 0.5 + 1e-14
    True
    """
    if matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(
            f"expected a square matrix, got {tuple(matrix.shape)}; "
            "use the norm of the pseudo-inverse instead"
        )
    X, defect = _approximate_inverse(exact(matrix))
    return spectral_norm(X) / (1 - defect)


def inverse_with_error(matrix: Num[Tensor, "n n"]) -> tuple[Tensor, Upper]:
    """An approximate inverse X of W and a certified bound of ||W^-1 - X||; inf if W is singular."""
    X, defect = _approximate_inverse(exact(matrix))
    return X, spectral_norm(X) * defect / (1 - defect)


def _approximate_inverse(W: Tensor) -> tuple[Tensor, Upper]:
    """X and a certified bound of ||I - X W||, infinite where X is not finite."""
    X, info = torch.linalg.inv_ex(W)
    if int(info) != 0 or not is_finite(X):
        return torch.zeros_like(W), Upper(math.inf)
    residual = X @ W
    residual.diagonal().sub_(1)
    rounding = gamma(len(W) + 2) * frobenius_norm(X) * frobenius_norm(W) + 2 * UNIT * len(W)
    return X, spectral_norm(residual, rounding)


def exact(tensor: Tensor) -> Tensor:
    """The same numbers in float64 (complex128), detached and on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64)
