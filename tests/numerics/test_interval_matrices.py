"""Matrices of intervals: every sampled product, inverse and norm is enclosed."""

from __future__ import annotations

import math

import torch

from inn_guard.numerics.interval_matrices import (
    interval_inverse,
    interval_norm,
    matmul,
    triangular_inverse,
)
from inn_guard.numerics.intervals import Interval
from tests.cases.trials import trials

ROUNDING = 1e-12  # of what is computed from samples


def drawn(generator, *shape, width=0.1):
    centre = torch.randn(*shape, generator=generator, dtype=torch.float64)
    radius = width * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return Interval(centre - radius, centre + radius)


def corner(generator, A):
    """A matrix in A whose entries are ends of their intervals."""
    return torch.where(torch.rand(A.shape, generator=generator) < 0.5, A.lo, A.hi)


def holds(A, matrix, slack=ROUNDING):
    margin = slack * (1 + matrix.abs())
    return bool(((A.lo <= matrix + margin) & (matrix - margin <= A.hi)).all())


@trials(40, 400)
def test_products_and_norms(trials):
    generator = torch.Generator().manual_seed(0)
    for _ in range(trials):
        A, B = drawn(generator, 4, 3), drawn(generator, 3, 5)
        product, norm = matmul(A, B), interval_norm(A)[0]
        for _ in range(10):
            a, b = corner(generator, A), corner(generator, B)
            assert holds(product, a @ b)
            assert float(torch.linalg.matrix_norm(a, 2)) <= norm * (1 + ROUNDING)


@trials(40, 400)
def test_inverses(trials):
    generator = torch.Generator().manual_seed(1)
    for _ in range(trials):
        A = drawn(generator, 4, 4, width=0.02)
        L = drawn(generator, 4, 4).map(torch.tril)
        L = L + Interval.of(3 * torch.eye(4))
        inverse, triangular = interval_inverse(A), triangular_inverse(L)
        for _ in range(10):
            a, lower = corner(generator, A), corner(generator, L).tril()
            exact = torch.linalg.inv(a)
            assert holds(inverse, exact, 1e-11 * float(torch.linalg.cond(a)))
            assert holds(triangular, torch.linalg.inv(lower), 1e-9)


def test_points_are_known_to_rounding():
    generator = torch.Generator().manual_seed(2)
    A = Interval.of(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    bound = interval_norm(A)[0]
    assert bound <= float(torch.linalg.matrix_norm(A.lo, 2)) * (1 + 1e-12)
    assert float(interval_inverse(A).radius.max()) < 1e-9
    assert float(matmul(A, interval_inverse(A)).radius.max()) < 1e-8


def test_matrices_that_may_be_singular_have_no_inverse():
    one = torch.ones(2, 2, dtype=torch.float64)
    assert interval_inverse(Interval(-one, one)).hi.min() == math.inf
    lower = Interval(torch.diag(-one[0]), torch.diag(one[0]))
    assert triangular_inverse(lower).hi.min() == math.inf


def test_what_is_zero_in_a_triangle_does_not_matter():
    L = Interval.of(torch.tensor([[2.0, 0.0], [1.0, 4.0]], dtype=torch.float64))
    exact = torch.tensor([[0.5, 0.0], [-0.125, 0.25]], dtype=torch.float64)
    assert holds(triangular_inverse(L), exact)
    assert float(triangular_inverse(L).radius.max()) < 1e-12
