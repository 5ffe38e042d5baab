"""Block formulas against thousands of random Jacobians, Table 3 as printed, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from inn_guard.lipschitz.maps import closed_forms as blocks
from inn_guard.lipschitz.maps import spline_closed_forms as splines

ROUNDING = 1 + 1e-10


def norm(A: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(A, 2))


def trials(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield generator, 10 ** float(torch.empty(()).uniform_(-1, 1, generator=generator))


def test_additive_is_exact_and_below_table_3():
    for generator, size in trials(1500, 0):
        a, b = torch.randint(1, 5, (2,), generator=generator).tolist()
        T = size * torch.randn(b, a, generator=generator)
        J = torch.eye(a + b)
        J[a:, :a] = T
        bound = blocks.additive_coupling(norm(T))
        assert norm(J) <= bound.forward * ROUNDING <= norm(J) * ROUNDING**2
        assert norm(torch.linalg.inv(J)) <= bound.inverse * ROUNDING
        assert bound.forward < blocks.additive_coupling(norm(T), paper=True).forward


def test_affine_dominates_random_blocks_and_is_below_table_3():
    for generator, size in trials(1500, 1):
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
    assert blocks.additive_coupling(2.0, paper=True).inverse == pytest.approx(3)
    assert blocks.affine_coupling(
        blocks.Pair(2.0, 3.0), blocks.Pair(0.5, 4.0), paper=True
    ) == pytest.approx((3, 7))
    assert blocks.invertible_residual(0.5, paper=True) == pytest.approx((1.5, 2))
    assert blocks.neural_ode(2.0, 0.5, paper=True) == pytest.approx((math.e, math.e))
    assert blocks.diagonal(torch.tensor([-3.0, 0.5])) == pytest.approx((3, 2))


def test_residual_and_ode_with_logarithmic_norms():
    for generator, _ in trials(600, 2):
        G = torch.randn(4, 4, generator=generator)
        G = G / norm(G) * 0.95 * float(torch.rand((), generator=generator))
        spectrum = torch.linalg.eigvalsh((G + G.T) / 2)
        low, high, L = float(spectrum[0]), float(spectrum[-1]), norm(G)
        tight, plain = (
            blocks.invertible_residual(L, largest=high, smallest=low),
            blocks.invertible_residual(L),
        )
        J = torch.eye(4) + G
        for true, a, b in zip((norm(J), norm(torch.linalg.inv(J))), tight, plain, strict=True):
            assert true <= a * ROUNDING <= b * ROUNDING**2
        flow = blocks.neural_ode(3 * L, 2.0, largest=3 * high, smallest=3 * low)
        assert norm(torch.linalg.matrix_exp(6 * G)) <= flow.forward * ROUNDING
        assert norm(torch.linalg.matrix_exp(-6 * G)) <= flow.inverse * ROUNDING
    assert blocks.invertible_residual(1.2).inverse == math.inf


def test_planar_is_exact_at_its_worst_slope():
    for generator, size in trials(1000, 3):
        u, w = size * torch.randn(4, generator=generator), torch.randn(4, generator=generator)
        if float(u @ w) <= -0.95:
            u = u * (0.9 / abs(float(u @ w)))
        bound = blocks.planar(u, w)
        slopes = [0.0, 1.0, float(torch.rand((), generator=generator))]
        J = [torch.eye(4) + h * torch.outer(u, w) for h in slopes]
        assert max(map(norm, J)) <= bound.forward * ROUNDING <= max(map(norm, J)) * ROUNDING**2
        inverses = [norm(torch.linalg.inv(A)) for A in J]
        assert max(inverses) <= bound.inverse * (1 + 1e-8)
    assert blocks.planar(torch.tensor([-2.0]), torch.tensor([1.0])).inverse == math.inf


def test_radial_by_autograd():
    for generator, size in trials(300, 4):
        alpha, beta = size, size * (3 * float(torch.rand((), generator=generator)) - 0.95)
        z = torch.randn(3, generator=generator) * size

        def flow(z: torch.Tensor, alpha: float = alpha, beta: float = beta) -> torch.Tensor:
            return z + beta * z / (alpha + z.norm())

        J = torch.autograd.functional.jacobian(flow, z)
        bound = blocks.radial(alpha, beta)
        assert norm(J) <= bound.forward * ROUNDING
        if beta > -alpha:
            assert norm(torch.linalg.inv(J)) <= bound.inverse * (1 + 1e-8)


def test_sylvester():
    for generator, size in trials(400, 5):
        Q = torch.linalg.qr(torch.randn(5, 3, generator=generator))[0]
        R, S = (size**0.5 * torch.randn(3, 3, generator=generator).triu() for _ in range(2))
        product = (R.diagonal() * S.diagonal()).abs()
        R.diagonal().copy_(R.diagonal().abs())
        S.diagonal().copy_(torch.where(product > 0, S.diagonal().abs(), S.diagonal()))
        bound = blocks.sylvester(R, S)
        for _ in range(4):
            h = torch.rand(3, generator=generator)
            J = torch.eye(5) + Q @ R @ torch.diag(h) @ S @ Q.T
            assert norm(J) <= bound.forward * ROUNDING
            assert norm(torch.linalg.inv(J)) <= bound.inverse * (1 + 1e-8)


def test_autoregressive_m_matrix():
    for generator, size in trials(600, 6):
        N = 0.3 * size * torch.randn(5, 5, generator=generator).tril(-1)
        D = (0.5 * torch.randn(5, generator=generator)).exp()
        bound = blocks.autoregressive(0.9 * D, N.abs())
        assert norm(torch.linalg.inv(torch.diag(D) + N)) <= bound.inverse * ROUNDING
    assert blocks.autoregressive(torch.zeros(2), torch.zeros(2, 2)).inverse == math.inf


def test_linear_and_injective_maps():
    for generator, _ in trials(300, 7):
        W = torch.randn(5, 3, generator=generator)
        bound, values = blocks.linear(W), torch.linalg.svdvals(W)
        assert float(values[0]) <= bound.forward <= float(values[0]) * (1 + 1e-9)
        assert (
            float(1 / values[-1]) <= bound.inverse * ROUNDING <= float(1 / values[-1]) * (1 + 1e-6)
        )
        assert blocks.linear(W.T) == pytest.approx(bound)
    assert blocks.linear(torch.zeros(2, 2)).inverse == math.inf


def test_logit_is_exact():
    x = torch.linspace(0, 1, 10001, dtype=torch.float64).requires_grad_()
    for alpha in (1e-6, 0.05, 0.3):
        (slope,) = torch.autograd.grad(torch.logit(alpha + (1 - 2 * alpha) * x).sum(), x)
        bound = blocks.logit(alpha)
        assert float(slope.max()) <= bound.forward * ROUNDING <= float(slope.max()) * (1 + 1e-8)
        assert (
            float((1 / slope).max())
            <= bound.inverse * ROUNDING
            <= float((1 / slope).max()) * (1 + 1e-6)
        )


def test_rational_quadratic_bins_are_exact():
    for generator, _ in trials(400, 8):
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
    assert blocks.additive_coupling(1e-20).forward > 1
    assert blocks.additive_coupling(1e-20, paper=True).forward > 1
    assert np.isinf(blocks.triangular_norm(math.inf, 1.0))
