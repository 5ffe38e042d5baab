"""Block formulas against thousands of random Jacobians, Table 3 as printed, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from inn_guard.lipschitz.maps import closed_forms as blocks
from inn_guard.lipschitz.maps import spline_closed_forms as splines
from inn_guard.numerics.intervals import Interval
from tests.cases.trials import trials

ROUNDING = 1 + 1e-10


def norm(A: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(A, 2))


def additive_coupling(lipschitz: float, *, paper: bool = False) -> blocks.Pair:
    one = blocks.Pair(1.0, 1.0)
    return blocks.affine_coupling(blocks.Pair(lipschitz, lipschitz), one, paper=paper)


def draws(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield generator, 10 ** float(torch.empty(()).uniform_(-1, 1, generator=generator))


@trials(200, 1500)
def test_additive_is_exact_and_below_table_3(trials):
    for generator, size in draws(trials, 0):
        a, b = torch.randint(1, 5, (2,), generator=generator).tolist()
        T = size * torch.randn(b, a, generator=generator)
        J = torch.eye(a + b)
        J[a:, :a] = T
        bound = additive_coupling(norm(T))
        assert norm(J) <= bound.forward * ROUNDING <= norm(J) * ROUNDING**2
        assert norm(torch.linalg.inv(J)) <= bound.inverse * ROUNDING
        assert bound.forward < additive_coupling(norm(T), paper=True).forward


@trials(200, 1500)
def test_affine_dominates_random_blocks_and_is_below_table_3(trials):
    for generator, size in draws(trials, 1):
        a, b = torch.randint(1, 5, (2,), generator=generator).tolist()
        T, D = (
            size * torch.randn(b, a, generator=generator),
            torch.randn(b, generator=generator).exp(),
        )
        J = torch.eye(a + b)
        J[a:, :a], J[a:, a:] = T, torch.diag(D)
        m = blocks.Pair(norm(T), norm(T / D[:, None]))
        c = blocks.Pair(float(D.max()), float((1 / D).max()))
        bound, printed = blocks.affine_coupling(m, c), blocks.affine_coupling(m, c, paper=True)
        for true, tight, loose in zip(
            (norm(J), norm(torch.linalg.inv(J))), bound, printed, strict=True
        ):
            assert true <= tight * ROUNDING
            assert tight <= loose * ROUNDING


def test_printed_formulas():
    assert additive_coupling(2.0, paper=True).inverse == pytest.approx(3)
    assert blocks.affine_coupling(
        blocks.Pair(2.0, 3.0), blocks.Pair(0.5, 4.0), paper=True
    ) == pytest.approx((3, 7))
    assert blocks.invertible_residual(0.5) == pytest.approx((1.5, 2))
    slope = Interval.of(torch.tensor([-3.0, 0.5]))
    assert blocks.elementwise(slope) == pytest.approx((3, 2))


@trials(80, 600)
def test_residual_maps(trials):
    for generator, _ in draws(trials, 2):
        G = torch.randn(4, 4, generator=generator)
        G = G / norm(G) * 0.95 * float(torch.rand((), generator=generator))
        J = torch.eye(4) + G
        bound = blocks.invertible_residual(norm(G))
        assert norm(J) <= bound.forward * ROUNDING
        assert norm(torch.linalg.inv(J)) <= bound.inverse * ROUNDING
    assert blocks.invertible_residual(1.2).inverse == math.inf


@trials(40, 300)
def test_linear_and_injective_maps(trials):
    for generator, _ in draws(trials, 7):
        W = torch.randn(5, 3, generator=generator)
        bound, values = blocks.linear(W), torch.linalg.svdvals(W)
        assert float(values[0]) <= bound.forward <= float(values[0]) * (1 + 1e-9)
        assert (
            float(1 / values[-1]) <= bound.inverse * ROUNDING <= float(1 / values[-1]) * (1 + 1e-6)
        )
        assert blocks.linear(W.T) == pytest.approx(bound)
    assert blocks.linear(torch.zeros(2, 2)).inverse == math.inf


@trials(50, 400)
def test_rational_quadratic_bins_are_exact(trials):
    for generator, _ in draws(trials, 8):
        a, b = (2 * torch.randn(2, generator=generator)).exp().tolist()
        s = float(torch.randn((), generator=generator).exp())
        xi = torch.linspace(0, 1, 20001, dtype=torch.float64)
        P = b * xi**2 + 2 * xi * (1 - xi) + a * (1 - xi) ** 2
        slope = s * P / (1 + (a + b - 2) * xi * (1 - xi)) ** 2
        bound = splines.rational_quadratic_spline(
            torch.tensor([1.0]), torch.tensor([s]), torch.tensor([a * s, b * s])
        )
        assert float(slope.max()) <= bound.forward <= float(slope.max()) * (1 + 1e-4)
        assert float((1 / slope).max()) <= bound.inverse <= float((1 / slope).max()) * (1 + 1e-4)


def test_linear_spline_is_exact():
    widths, heights = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5])
    assert splines.linear_spline(widths, heights) == pytest.approx((2.5, 1.6))


def test_bounds_are_rounded_up():
    # 1 + 1e-20 rounds to 1: a bound that says 1 exactly would be below the truth
    assert additive_coupling(1e-20).forward > 1
    assert additive_coupling(1e-20, paper=True).forward > 1
    assert np.isinf(blocks.triangular_norm(math.inf, 1.0))
