"""The neural ODE block against flows known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inn_guard.layers.ode import Adaptive, FixedStep, HutchinsonTrace, NeuralODE, RungeKutta


class Linear(nn.Module):
    """dx/dt = A x."""

    def __init__(self, A):
        super().__init__()
        self.A = nn.Parameter(A)

    def forward(self, t, x):
        return x @ self.A.T


@pytest.fixture
def A():
    return 0.7 * torch.randn(3, 3)


def test_a_linear_field_flows_by_the_matrix_exponential(A):
    x = torch.randn(4, 3)
    for solver in (Adaptive(rtol=1e-10, atol=1e-12), FixedStep(100)):
        layer = NeuralODE(Linear(A), duration=1.5, solver=solver)
        z, log_det = layer.forward_and_log_det(x)
        assert torch.allclose(z, x @ torch.linalg.matrix_exp(1.5 * A).T, atol=1e-7)
        assert torch.allclose(log_det, (1.5 * A.trace()).expand(4), atol=1e-9)
        assert torch.allclose(layer.inverse(z), x, atol=1e-7)
        assert torch.allclose(layer.inverse_and_log_det(z)[1], -log_det, atol=1e-9)


def test_euler_is_of_first_order_and_runge_kutta_of_fourth(A):
    x = torch.randn(4, 3)
    exact = x @ torch.linalg.matrix_exp(A).T

    def error(method, steps):
        return (NeuralODE(Linear(A), solver=FixedStep(steps, method))(x) - exact).norm().item()

    assert error(RungeKutta.EULER, 10) / error(RungeKutta.EULER, 20) == pytest.approx(2, rel=0.3)
    assert error(RungeKutta.RK4, 10) / error(RungeKutta.RK4, 20) == pytest.approx(16, rel=0.3)


def test_hutchinson_trace_is_exact_for_a_diagonal_field_and_unbiased_otherwise(A):
    x = torch.randn(4, 3)
    diagonal = NeuralODE(
        Linear(torch.diag(A.diagonal())), solver=FixedStep(10), trace=HutchinsonTrace()
    )
    assert torch.allclose(diagonal.forward_and_log_det(x)[1], A.trace().expand(4), atol=1e-12)
    many = NeuralODE(Linear(A), solver=FixedStep(1), trace=HutchinsonTrace(probes=4000))
    spread = (A + A.T).norm() / 4000**0.5
    assert bool(((many.forward_and_log_det(x)[1] - A.trace()).abs() <= 5 * spread).all())


def test_gradients_reach_the_field(A):
    layer = NeuralODE(Linear(A), solver=FixedStep(50))
    log_det = layer.forward_and_log_det(torch.randn(1, 3))[1]
    (gradient,) = torch.autograd.grad(log_det.sum(), layer.field.A)
    assert torch.allclose(gradient, torch.eye(3), atol=1e-9)


def test_a_sample_that_is_not_finite_returns_as_nan_and_leaves_the_others_alone(A):
    layer, x = NeuralODE(Linear(A)), torch.randn(3, 3)
    broken = x.clone()
    broken[1, 0] = torch.inf
    z, log_det = layer.forward_and_log_det(broken)
    assert bool(z[1].isnan().all() & log_det[1].isnan())
    assert torch.allclose(z[[0, 2]], layer(x[[0, 2]]))
    assert bool(layer(broken * torch.nan).isnan().all())


def test_an_explosion_comes_back_as_nan_not_as_an_exception():
    class Square(nn.Module):
        def forward(self, t, x):
            return x.square()

    layer = NeuralODE(Square(), duration=3.0)
    with torch.no_grad():
        assert bool(layer(torch.ones(1, 2)).isnan().all())


def test_bad_settings_are_named(A):
    with pytest.raises(ValueError, match="positive duration"):
        NeuralODE(Linear(A), duration=-1.0)
    with pytest.raises(ValueError, match="at least one step"):
        FixedStep(0)
