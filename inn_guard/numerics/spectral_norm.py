"""Certified spectral norms of matrices and of their inverses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Num
from torch import Tensor

from inn_guard.numerics.rounding import (
    UNIT,
    Upper,
    above_shift,
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
    "singular_range",
    "spectral_norm",
]

STEPS = 40  #: of the Lanczos iteration, which only guesses
MARGIN = 1e-3  #: relative distance of the first shift tried from the guess


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


def singular_range(matrix: Num[Tensor, "n n"]) -> tuple[float, Upper]:
    """A lower bound of sigma_min and an upper bound of sigma_max, for large square matrices.

    Eigenvalues of A^T A are guessed by Lanczos iterations, and certified by Cholesky
    factorisations: a few products of matrices, where ``spectral_norm`` needs all eigenvalues. The
    bounds are off by a part in a thousand.

    Returns:
        (lower, upper); (0, inf) where nothing is proved.

    >>> least, most = singular_range(torch.diag(torch.tensor([2.0, 5.0])))
    >>> 1.99 < least <= 2.0 and 5.0 <= most < 5.01
    True
    """
    A = exact(matrix)
    if not is_finite(A) or not bool(A.any()):
        return 0.0, Upper(math.inf)
    scale = power_of_two(A)
    A = A / scale
    size = frobenius_norm(A)
    G = A.mT @ A
    rounding = gamma(len(A) + 2) * size * size
    top = _certified_shift(G, _guessed_eigenvalue(lambda v: G @ v, len(G)))
    least = 0.0
    L, info = torch.linalg.cholesky_ex(G)
    if int(info) == 0:
        guess = 1 / _guessed_eigenvalue(lambda v: torch.cholesky_solve(v[:, None], L)[:, 0], len(G))
        bottom = _certified_shift(-G, -guess) + rounding
        # sqrt is rounded to nearest
        least = math.sqrt(max(-float(bottom), 0.0)) * (1 - 2 * UNIT) * scale
    return least, (top + rounding).sqrt() * scale


def _guessed_eigenvalue(product: Callable[[Tensor], Tensor], n: int) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, roughly, by Lanczos."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, generator=generator, device="cpu", dtype=torch.float64)
    basis = (v / v.norm())[None]
    for _ in range(min(STEPS, n - 1)):
        w = product(basis[-1])
        # twice: once leaves too much of the basis in w
        w = w - basis.T @ (basis @ w)
        w = w - basis.T @ (basis @ w)
        length = w.norm()
        if not length > 1e-12:
            break
        basis = torch.cat([basis, (w / length)[None]])
    projected = basis @ torch.stack([product(row) for row in basis], 1)
    return float(torch.linalg.eigvalsh((projected + projected.T) / 2)[-1])


def _certified_shift(H: Tensor, guess: float) -> Upper:
    """A bound of the largest eigenvalue of H a little above a guess of it; inf if there is none."""
    margin = MARGIN
    while margin < 1:
        s = Upper(guess + margin * abs(guess))
        shifted = -H
        shifted.diagonal().add_(s)
        if int(torch.linalg.cholesky_ex(shifted)[1]) == 0:
            return above_shift(H[None], s)
        margin *= 4
    return Upper(math.inf)


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
