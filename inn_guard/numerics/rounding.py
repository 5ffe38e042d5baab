"""Rounding outwards: upper bounds as numbers and as tensors, certified largest eigenvalues.

Assumptions: IEEE-754 float64 with round to nearest, gradual underflow, and matrix products and
factorisations that add and multiply in any order (with or without fused operations) but never by
Strassen-like schemes.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "TINY",
    "UNIT",
    "Upper",
    "above_shift",
    "enlarged",
    "frobenius_norm",
    "gamma",
    "gamma_of",
    "is_finite",
    "largest_eigenvalue",
    "power_of_two",
]

UNIT = 2.0**-53  #: unit roundoff of float64
TINY = 1e-300  #: more than underflow loses in a sum of products; keeps divisors off zero
SMALL_NORM = 2.0**-400  #: below it squares of entries may underflow
CANDIDATES = 8  #: matrices of a batch whose eigenvalues are computed outright


class Upper(float):
    """An upper bound of a real number; +, -, *, / and sqrt round up and give upper bounds again.

    A plain number on the right of - and / counts as exact or as a lower bound, elsewhere as exact
    or as an upper bound. ``number - upper`` and ``number / upper`` are plain floats, rounded down:
    lower bounds. Products and quotients are for numbers that are not negative. NaN becomes
    infinity: nothing is known. ``max`` and ``min`` of Python may return a plain number; use
    ``Upper.max`` and ``Upper.min``.

    >>> third = Upper(1.0) / 3
    >>> 3 * third > 1
    True
    >>> Upper(0.5) / (1 - Upper(2.0))
    inf
    """

    __slots__ = ()

    def __new__(cls, value: float | int) -> Upper:  # noqa: D102 - the class says it
        if value != value:
            return super().__new__(cls, math.inf)
        return super().__new__(cls, value)

    @classmethod
    def computed(cls, value: float | int, operations: int) -> Upper:
        """A bound of a nonnegative number that was computed in floating point.

        Args:
            value: the computed number; sums, products, quotients and roots of nonnegative numbers.
            operations: number of roundings on the longest path to it.
        """
        return cls(value) * (1 + gamma(operations))

    @classmethod
    def max(cls, *values: float | int) -> Upper:
        """The largest: a bound of all of them."""
        return cls(max(map(cls, values)))

    @classmethod
    def min(cls, *values: float | int) -> Upper:
        """The smallest of several bounds of the same number."""
        return cls(min(map(cls, values)))

    def sqrt(self) -> Upper:
        """The root; 0 for negative numbers."""
        return _next_above(math.sqrt(max(float(self), 0.0)))

    def __add__(self, other: Any) -> Upper:
        if not isinstance(other, (int, float)):
            return NotImplemented
        if other == 0:
            return self
        return _next_above(float(self) + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Upper:
        if not isinstance(other, (int, float)):
            return NotImplemented
        _refuse_upper(other)
        return self + (-other)

    def __rsub__(self, other: Any) -> float:
        return _next_below(other - float(self))

    def __mul__(self, other: Any) -> Upper:
        if not isinstance(other, (int, float)):
            return NotImplemented
        if self < 0 or other < 0:
            raise ValueError(f"expected numbers that are not negative, got {self!r} * {other!r}")
        if other == 1:
            return self
        return _next_above(float(self) * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Upper:
        if not isinstance(other, (int, float)):
            return NotImplemented
        _refuse_upper(other)
        if self < 0:
            raise ValueError(f"expected a numerator that is not negative, got {self!r}")
        if not other > 0:
            return Upper(math.inf)
        return _next_above(float(self) / other)

    def __rtruediv__(self, other: Any) -> float:
        if other < 0 or not self > 0:
            raise ValueError(f"expected positive numbers, got {other!r} / {self!r}")
        return _next_below(other / float(self))

    def _no_bound(self, other: Any) -> NoReturn:
        raise TypeError("expected +, -, *, / or sqrt; other operations of Upper are not rounded up")

    __pow__ = __rpow__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = _no_bound  # type: ignore[assignment]


def _refuse_upper(other: Any) -> None:
    if isinstance(other, Upper):
        raise TypeError(
            "expected a lower bound on the right of - and /, got an upper bound; "
            "convert it with float() where a result without a guarantee is enough"
        )


def _next_above(x: float) -> Upper:
    return Upper(math.nextafter(x, math.inf))


def _next_below(x: float) -> float:
    return math.nextafter(x, -math.inf)


def gamma(operations: int) -> Upper:
    """An upper bound of gamma_k = k u / (1 - k u), the relative error of k rounded operations.

    Args:
        operations: k, number of operations with k u < 1.

    Raises:
        ValueError: if k u >= 1.

    References:
        Accuracy and Stability of Numerical Algorithms, Higham, 2002, Lemma 3.1.
    """
    if operations * UNIT >= 1:
        raise ValueError(f"expected fewer than 2^53 operations, got {operations}")
    k = Upper(operations) * UNIT
    return k / (1 - k)


def gamma_of(matrix: Tensor, operations: int) -> Upper:
    """``gamma`` for the entries of a matrix, whether real or complex."""
    # complex products and quotients err by less than eight real roundings each (Higham, Lemma 3.5)
    factor = 8 if matrix.is_complex() else 1
    return gamma(factor * operations)


def enlarged(x: Tensor, operations: int) -> Tensor:
    """Upper bounds of nonnegative numbers, computed as x with that many roundings; 0 stays 0."""
    # two more than for a number: the factor itself and the product with it are rounded
    return x * (1 + gamma(2 * operations + 4))


def is_finite(x: Tensor) -> bool:
    """Whether no entry, real or complex, is infinite or NaN."""
    return bool(torch.isfinite(x).all())


def power_of_two(x: Tensor) -> float:
    """The power of two above max|x|, by which one divides exactly; 1 if x is 0 or not finite."""
    peak = float(x.abs().max()) if x.numel() else 0.0
    if peak == 0 or not math.isfinite(peak):
        return 1.0
    exponent = math.frexp(peak)[1]
    return 2.0 ** min(max(exponent, -1000), 1000)


def frobenius_norm(matrices: Tensor) -> Upper:
    """An upper bound of the largest Frobenius norm of a batch (..., m, n); 0 for an empty one."""
    if matrices.numel() == 0:
        return Upper(0.0)
    # a complex number has two squares to add, and its squared modulus three roundings
    operations = 4 * matrices.shape[-2] * matrices.shape[-1] + 4
    largest = float(torch.linalg.matrix_norm(matrices).max())
    if largest >= SMALL_NORM:
        return Upper.computed(largest, operations)
    scale = power_of_two(matrices)
    return (
        Upper.computed(float(torch.linalg.matrix_norm(matrices / scale).max()), operations) * scale
    )


def largest_eigenvalue(matrices: Tensor) -> Upper:
    """A certified upper bound of the largest eigenvalue of a batch of Hermitian matrices.

    If the Cholesky factorisation of s I - H runs to its end in float64, then lmax(H) <= s + c with
    c = gamma_{n+1} / (1 - gamma_{n+1}) tr(s I - H); s is an ordinary eigenvalue, a little enlarged
    until it does.

    Args:
        matrices: H, (n, n) or (batch, n, n), float64 or complex128; the lower triangles are read,
            and are exact.

    Returns:
        The bound; inf if an entry is not finite.

    References:
        Verification of Positive Definiteness, Rump, 2006; Higham, 2002, Theorem 10.7.
    """
    H = matrices.reshape(-1, *matrices.shape[-2:])
    if not is_finite(H):
        return Upper(math.inf)
    s = _shift_with_cholesky(H)
    if not math.isfinite(s):
        return Upper(math.inf)
    return above_shift(H, s)


def above_shift(H: Tensor, s: Upper) -> Upper:
    """The bound s + c of ``largest_eigenvalue``, where s I - H has been factorised."""
    n = H.shape[-1]
    diagonal = H.diagonal(dim1=1, dim2=2).real
    trace = Upper.computed(float((-diagonal + s).clamp_min(0).sum(1).max()), n + 2)
    subtraction = 2 * UNIT * (Upper(abs(s)) + float(diagonal.abs().max()))
    weight = gamma_of(H, n + 2)
    return s + (weight / (1 - weight) * trace + subtraction)


def _shift_with_cholesky(H: Tensor) -> Upper:
    """An s near the largest eigenvalue with a Cholesky factorisation of s I - H; inf if none."""
    size = max(float(torch.linalg.matrix_norm(H).max()), TINY)
    shift, slack = _estimate(H), 4 * H.shape[-1] * UNIT
    while True:
        s = Upper(shift) + slack * size
        if not math.isfinite(s):
            return s
        failed = torch.linalg.cholesky_ex(_shifted(H, s))[1] != 0
        if not bool(failed.any()):
            return s
        if int(failed.sum()) < len(H):
            shift = max(shift, float(torch.linalg.eigvalsh(H[failed])[:, -1].max()))
        slack *= 4


def _shifted(H: Tensor, s: float) -> Tensor:
    M = -H
    M.diagonal(dim1=1, dim2=2).add_(s)
    return M


def _estimate(H: Tensor) -> float:
    """The largest eigenvalue of the matrices of largest norm; Cholesky corrects this estimate."""
    if len(H) > CANDIDATES:
        square = H @ H
        H = H[torch.linalg.matrix_norm(square @ square).topk(CANDIDATES).indices]
    return float(torch.linalg.eigvalsh(H)[:, -1].max())
