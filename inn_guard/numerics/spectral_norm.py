"""Certified spectral norms of matrices, of their inverses, and of their symmetric parts."""

from __future__ import annotations

import math

import torch
from jaxtyping import Num
from torch import Tensor

from inn_guard.numerics.rounding import UNIT, gamma, largest_eigenvalue, power_of_two, up

__all__ = [
    "cheap_norm",
    "exact",
    "inverse_norm",
    "inverse_with_error",
    "logarithmic_norm",
    "norm_operations",
    "spectral_norm",
]


def spectral_norm(matrix: Num[Tensor, "*batch m n"], error: float = 0.0) -> float:
    """A certified upper bound of the spectral norm, the largest over the batch; never below the true one.

    ||A||^2 <= lmax(fl(A^H A)) + gamma ||A||_F^2, the first by Cholesky with outward rounding.

    Args:
        matrix: A, real or complex of any precision; its entries are taken as exact.
        error: Frobenius norm of what is not known about A, added to the result.

    Returns:
        sigma_max(A) or a little more (excess about n u); inf if an entry is not finite.

    >>> A = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    >>> 5.0 <= spectral_norm(A) < 5.0 + 1e-13
    True

    References:
        Verification of Positive Definiteness, Rump, 2006.
    """
    if matrix.numel() == 0 or not bool((matrix != 0).any()):
        return up(error) if error else 0.0
    A = exact(matrix).reshape(-1, *matrix.shape[-2:])
    if not bool(torch.isfinite(torch.view_as_real(A) if A.is_complex() else A).all()):
        return math.inf
    A = A if A.shape[1] >= A.shape[2] else A.mT
    scale = power_of_two(A)
    A = A / scale
    squares = largest_eigenvalue(A.mH @ A)
    product = up(gamma((8 if A.is_complex() else 1) * (A.shape[1] + 2)) * _frobenius_square(A), 2)
    root = up(math.sqrt(up(max(squares, 0.0) + product)), 2)
    return up(up(root * scale) + error) if error else up(root * scale)


def norm_operations(rows: int, columns: int) -> float:
    """About how many floating-point operations ``spectral_norm`` takes for one real matrix."""
    small = min(rows, columns)
    return 2.0 * rows * columns * small + 20.0 * small**3


def cheap_norm(matrix: Num[Tensor, "m n"]) -> float:
    """An upper bound of the spectral norm in one pass: the root of largest row sum times largest column sum.

    >>> cheap_norm(torch.eye(3)) >= 1.0
    True
    """
    if matrix.numel() == 0:
        return 0.0
    size = exact(matrix).abs()
    rounding = 1 + gamma(2 * sum(size.shape) + 4)
    sums = (float(size.sum(0).max()) * rounding, float(size.sum(1).max()) * rounding)
    roots = [up(math.sqrt(x), 2) for x in sums]
    bound = up(roots[0] * roots[1], 2)
    return bound if math.isfinite(bound) else math.inf


def inverse_norm(matrix: Num[Tensor, "m n"]) -> float:
    """A certified upper bound of ||W^-1||_2 from an approximate inverse X: ||X|| / (1 - ||I - X W||).

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
            f"expected a square matrix, got {tuple(matrix.shape)}; use the pseudo-inverse's norm instead"
        )
    X, defect = _approximate_inverse(exact(matrix))
    return up(spectral_norm(X) / math.nextafter(1 - defect, 0.0), 2) if defect < 1 else math.inf


def inverse_with_error(matrix: Num[Tensor, "n n"]) -> tuple[Tensor, float]:
    """An approximate inverse X of W and a certified bound of ||W^-1 - X||; infinite if W is singular in float64."""
    X, defect = _approximate_inverse(exact(matrix))
    return X, up(
        up(spectral_norm(X) * defect) / math.nextafter(1 - defect, 0.0), 2
    ) if defect < 1 else math.inf


def _approximate_inverse(W: Tensor) -> tuple[Tensor, float]:
    """X and a certified bound of ||I - X W||, infinite where X is not finite."""
    X, info = torch.linalg.inv_ex(W)
    if int(info) != 0 or not bool(torch.isfinite(X).all()):
        return torch.zeros_like(W), math.inf
    residual = X @ W
    residual.diagonal().sub_(1)
    sizes = up(up(math.sqrt(_frobenius_square(X)), 2) * up(math.sqrt(_frobenius_square(W)), 2), 2)
    return X, spectral_norm(residual, up(gamma(len(W) + 2) * sizes + 2 * UNIT * len(W), 2))


def logarithmic_norm(matrix: Num[Tensor, "m n"]) -> float:
    """A certified upper bound of the logarithmic norm mu_2(A) = lmax((A + A^T) / 2).

    Args:
        matrix: A, square, entries taken as exact.

    Returns:
        mu_2(A) or a little more; it may be negative.
    """
    A = exact(matrix)
    return up(
        largest_eigenvalue((A + A.mT) / 2) + up(UNIT * up(math.sqrt(_frobenius_square(A)), 2), 2)
    )


def exact(tensor: Tensor) -> Tensor:
    """The same numbers in float64 (complex128), detached and on the CPU."""
    tensor = tensor.detach().cpu()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _frobenius_square(A: Tensor) -> float:
    """An upper bound of the largest squared Frobenius norm of a batch."""
    flat = (torch.view_as_real(A) if A.is_complex() else A).reshape(A.shape[:-2].numel(), -1)
    return up(float(flat.square().sum(1).max()) * (1 + gamma(flat.shape[1] + 2)), 2)
