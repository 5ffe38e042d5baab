"""Rounding that only errs upwards: unit roundoff, Higham's gamma, and certified extreme eigenvalues by Cholesky.

Assumptions: IEEE-754 float64 with round to nearest, gradual underflow, and matrix products and factorisations that
add and multiply in any order (with or without fused operations) but never by Strassen-like schemes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["UNIT", "gamma", "largest_eigenvalue", "power_of_two", "up"]

UNIT = 2.0**-53  #: unit roundoff of float64
CANDIDATES = 8  #: matrices of a batch whose eigenvalues are computed outright


def up(x: float, ulps: int = 1) -> float:
    """The float ``ulps`` above x: what an operation rounded to nearest may at most have lost.

    >>> up(1.0) > 1.0
    True
    """
    for _ in range(ulps):
        x = math.nextafter(x, math.inf)
    return x


def gamma(operations: int) -> float:
    """An upper bound of gamma_k = k u / (1 - k u), the relative error of k rounded operations.

    Args:
        operations: k, number of operations with k u < 1.

    Raises:
        ValueError: if k u >= 1.

    References:
        Accuracy and Stability of Numerical Algorithms, Higham, 2002, Lemma 3.1.
    """
    k = operations * UNIT
    if k >= 1:
        raise ValueError(f"expected fewer than 2^53 operations, got {operations}")
    return up(up(k) / math.nextafter(1 - k, 0.0), 2)


def power_of_two(x: Tensor) -> float:
    """The power of two next above max|x|; dividing by it is exact up to underflow. 1 for zero or non-finite x."""
    peak = float(x.abs().max()) if x.numel() else 0.0
    return (
        1.0
        if peak == 0 or not math.isfinite(peak)
        else 2.0 ** min(max(math.frexp(peak)[1], -1000), 1000)
    )


def largest_eigenvalue(matrices: Tensor) -> float:
    """A certified upper bound of the largest eigenvalue of Hermitian matrices, over the whole batch.

    If the Cholesky factorisation of s I - H runs to its end in float64, then lmax(H) <= s + c with
    c = gamma_{n+1} / (1 - gamma_{n+1}) tr(s I - H); s is an ordinary eigenvalue, a little enlarged until it does.

    Args:
        matrices: H, (n, n) or (batch, n, n), float64 or complex128; the lower triangles are read, and are exact.

    Returns:
        The bound; inf if an entry is not finite.

    References:
        Verification of Positive Definiteness, Rump, 2006; Higham, 2002, Theorem 10.7.
    """
    H = matrices.reshape(-1, *matrices.shape[-2:])
    if not bool(torch.isfinite(torch.view_as_real(H) if H.is_complex() else H).all()):
        return math.inf
    n = H.shape[-1]
    # complex products and quotients err by less than eight real roundings each (Higham, Lemma 3.5)
    weight = gamma((8 if H.is_complex() else 1) * (n + 2))
    size = float(torch.linalg.matrix_norm(H).max())
    diagonal = H.diagonal(dim1=1, dim2=2).real
    shift, slack = _estimate(H), 4 * n * UNIT
    while True:
        s = up(shift + slack * max(size, 1e-300), 2)
        if not math.isfinite(s):
            return math.inf
        failed = torch.linalg.cholesky_ex(_shifted(H, s))[1] != 0
        if not bool(failed.any()):
            break
        if int(failed.sum()) < len(H):
            shift = max(shift, float(torch.linalg.eigvalsh(H[failed])[:, -1].max()))
        slack *= 4
    trace = up(float((s - diagonal).clamp_min(0).sum(1).max()) * (1 + gamma(n + 2)), 2)
    subtraction = 2 * UNIT * (abs(s) + float(diagonal.abs().max()))
    return up(
        s + up(up(weight / math.nextafter(1 - weight, 0.0), 2) * trace, 2) + up(subtraction, 2), 4
    )


def _shifted(H: Tensor, s: float) -> Tensor:
    M = -H
    M.diagonal(dim1=1, dim2=2).add_(s)
    return M


def _estimate(H: Tensor) -> float:
    """The largest eigenvalue of the matrices that look largest; an estimate that Cholesky then corrects."""
    if len(H) > CANDIDATES:
        square = H @ H
        H = H[torch.linalg.matrix_norm(square @ square).topk(CANDIDATES).indices]
    return float(torch.linalg.eigvalsh(H)[:, -1].max())
