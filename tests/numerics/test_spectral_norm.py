"""Certified norms against 40-digit arithmetic."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from inn_guard.numerics.rounding import gamma, largest_eigenvalue
from inn_guard.numerics.spectral_norm import inverse_norm, singular_range, spectral_norm
from tests.cases.trials import trials

mpmath.mp.dps = 40


def true_norm(A: torch.Tensor) -> mpmath.mpf:
    M = mpmath.matrix(A.tolist())
    gram = M.T * M if A.shape[0] >= A.shape[1] else M * M.T
    return mpmath.sqrt(max(mpmath.eigsy(gram, eigvals_only=True)))


def random_matrices(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for trial in range(count):
        rows, columns = torch.randint(1, 7, (2,), generator=generator).tolist()
        A = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        if trial % 3 == 0:
            A = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[
                0
            ]
        yield A * 10.0 ** float(torch.empty(()).uniform_(-6, 6, generator=generator))


@trials(60, 400)
def test_spectral_norm_is_never_below_40_digits(trials):
    for A in random_matrices(trials, 0):
        truth = true_norm(A)
        bound = spectral_norm(A)
        assert truth <= bound <= truth * (1 + mpmath.mpf(10) ** -12)


def test_power_iteration_and_svd_are_below_where_the_certificate_is_not():
    # why a certificate is needed at all: the library's own norm fails the same test
    below = sum(
        float(torch.linalg.matrix_norm(A, 2)) < true_norm(A) for A in random_matrices(100, 1)
    )
    assert below > 0
    assert all(spectral_norm(A) >= true_norm(A) for A in random_matrices(100, 1))


@trials(10, 100)
def test_complex_norm_equals_that_of_the_real_embedding(trials):
    generator = torch.Generator().manual_seed(2)
    for _ in range(trials):
        A = torch.randn(3, 4, 5, generator=generator, dtype=torch.complex128)
        real = torch.cat([torch.cat([A.real, -A.imag], 2), torch.cat([A.imag, A.real], 2)], 1)
        truth = max(true_norm(block) for block in real)
        assert truth <= spectral_norm(A) <= truth * (1 + mpmath.mpf(10) ** -11)


@trials(30, 150)
def test_inverse_norm_is_never_below_40_digits(trials):
    generator = torch.Generator().manual_seed(3)
    for trial in range(trials):
        n = int(torch.randint(1, 6, (), generator=generator))
        W = torch.randn(n, n, generator=generator, dtype=torch.float64)
        if trial % 3 == 0 and n > 1:
            U, _, V = torch.linalg.svd(W)
            W = U @ torch.diag(torch.logspace(0, -8, n, dtype=torch.float64)) @ V
        inverse = mpmath.matrix(W.tolist()) ** -1
        truth = mpmath.sqrt(max(mpmath.eigsy(inverse.T * inverse, eigvals_only=True)))
        assert truth <= inverse_norm(W) <= truth * (1 + mpmath.mpf(10) ** -5)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_scales_do_not_overflow(scale):
    A = scale * torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    assert 5.0 * scale <= spectral_norm(A) <= 5.0 * scale * (1 + 1e-13)


def test_zero_empty_singular_and_non_finite():
    assert spectral_norm(torch.zeros(3, 2)) == 0
    assert spectral_norm(torch.zeros(0, 2)) == 0
    assert spectral_norm(torch.tensor([[math.nan]])) == math.inf
    assert spectral_norm(torch.tensor([[math.inf]])) == math.inf
    assert inverse_norm(torch.zeros(2, 2)) == math.inf
    assert inverse_norm(torch.tensor([[1.0, 1.0], [1.0, 1.0]])) == math.inf
    with pytest.raises(ValueError, match="square"):
        inverse_norm(torch.zeros(2, 3))


def test_half_precisions_are_taken_as_exact():
    A = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert spectral_norm(A) >= true_norm(A.double())


def test_batch_takes_the_largest():
    A = torch.randn(40, 5, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    largest = max(float(spectral_norm(matrix)) for matrix in A)
    assert spectral_norm(A) == pytest.approx(largest, rel=1e-13)


def test_largest_eigenvalue_of_an_indefinite_matrix():
    H = torch.diag(torch.tensor([-3.0, -2.0], dtype=torch.float64))
    assert -2.0 <= largest_eigenvalue(H) < -2.0 + 1e-13


def test_gamma():
    assert gamma(1) >= 2.0**-53
    with pytest.raises(ValueError, match="fewer"):
        gamma(2**53)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("n", [1, 3, 60])
def test_singular_ranges_hold_all_singular_values(n, condition):
    generator = torch.Generator().manual_seed(n)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    for scale in (1.0, 1e-120, 1e120):
        A = scale * (left * values) @ right
        least, most = singular_range(A)
        largest, smallest = scale * float(values[0]), scale * float(values[-1])
        assert largest * (1 - 1e-14 * n) <= most <= 1.01 * largest
        # the Gram matrix knows small values to the root of the rounding
        assert 0 <= least <= smallest * (1 + 1e-14 * n * condition)
        if condition < 1e6:
            assert least >= 0.98 * smallest


def test_singular_ranges_of_what_is_singular_or_not_finite():
    assert singular_range(torch.zeros(3, 3)) == (0.0, math.inf)
    assert singular_range(torch.diag(torch.tensor([1.0, math.nan]))) == (0.0, math.inf)
    least, most = singular_range(torch.ones(4, 4))
    assert least < 1e-6
    assert 4.0 <= most < 4.01
