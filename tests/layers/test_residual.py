"""Residual layers: certified contractions, fixed points, estimators of the log-determinant."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from inn_guard.core.invertible import NotApplicable
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.layers.contraction import (
    Contraction,
    LipSwish,
    contractive,
    contractive_conv_net,
    contractive_mlp,
)
from inn_guard.layers.fixed_point import FixedPoint
from inn_guard.layers.residual import Residual
from inn_guard.layers.residual_log_det import ExactLogDet, PowerSeries, RussianRoulette
from tests.cases.case import randomize


def dense(convolution: nn.Conv2d, size: int) -> torch.Tensor:
    """The matrix of a convolution on size x size images."""
    eye = torch.eye(convolution.in_channels * size * size, dtype=convolution.weight.dtype)
    columns = convolution(eye.reshape(-1, convolution.in_channels, size, size)) - convolution(
        torch.zeros(1, convolution.in_channels, size, size, dtype=convolution.weight.dtype)
    )
    return columns.flatten(1).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_contractive_matrix_is_never_above_the_coefficient(dtype):
    for trial in range(100):
        torch.manual_seed(trial)
        layer = nn.Linear(*torch.randint(1, 12, (2,)).tolist(), dtype=dtype)
        randomize(layer, 10.0 ** (trial % 5 - 2))
        contractive(layer, coefficient=0.9)
        norm = torch.linalg.matrix_norm(layer.weight.detach().double(), 2)
        assert norm <= 0.9
        original = torch.linalg.matrix_norm(
            layer.parametrizations.weight.original.detach().double(), 2
        )
        assert norm >= min(original, 0.9 * (1 - 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_contractive_convolution_is_never_above_the_coefficient(dtype):
    for trial in range(5):
        torch.manual_seed(trial)
        layer = nn.Conv2d(*torch.randint(1, 5, (2,)).tolist(), 3, padding=1, dtype=dtype)
        randomize(layer, 1.0)
        contractive(layer, coefficient=0.8)
        for size in (1, 4, 9):
            assert torch.linalg.matrix_norm(dense(layer, size).detach().double(), 2) <= 0.8
        assert torch.linalg.matrix_norm(dense(layer, 9).detach().double(), 2) > 0.6


@pytest.mark.parametrize(
    "weight", [torch.randn(4, 6), torch.randn(3, 4, 3, 3)], ids=["matrix", "kernel"]
)
def test_gradient_of_the_scaled_weight(weight):
    contraction = Contraction(0.9)
    weight = weight.double().requires_grad_()
    direction = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad((contraction(weight) * direction.flip(0)).sum(), weight)
    with torch.no_grad():
        step = 1e-6
        ahead, behind = (
            contraction(weight + step * direction),
            contraction(weight - step * direction),
        )
    by_differences = ((ahead - behind) * direction.flip(0)).sum() / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(by_differences.item(), rel=1e-6)


def test_a_small_weight_is_left_alone():
    weight = 0.01 * torch.randn(5, 5)
    assert torch.equal(Contraction(0.9)(weight), weight)


def test_the_bound_follows_changes_that_bypass_the_version_counter():
    layer = contractive(nn.Linear(6, 6), coefficient=0.5)
    layer(torch.randn(1, 6))
    layer.parametrizations.weight.original.data.mul_(1000)
    assert torch.linalg.matrix_norm(layer.weight.detach(), 2) <= 0.5


def test_lip_swish_is_one_lipschitz_for_every_beta():
    x = torch.linspace(-50, 50, 200_001).requires_grad_()
    for raw in (-5.0, 0.5, 5.0, 50.0):
        module = LipSwish()
        nn.init.constant_(module.raw, raw)
        (slope,) = torch.autograd.grad(module(x).sum(), x)
        assert 0.99 < slope.abs().max() <= 1 or raw == -5.0
        assert slope.abs().max() <= 1


def residual(coefficient: float = 0.9, **settings) -> Residual:
    network = contractive_mlp([4, 16, 4], coefficient=coefficient)
    for module in network:
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.parametrizations.weight.original.mul_(10)
    return Residual(network, **settings)


def test_the_inverse_says_that_it_converged():
    layer, x = residual(), torch.randn(6, 4)
    assert len(layer.convergence.converged) == 0
    assert torch.allclose(layer.inverse(layer(x)), x, atol=1e-13)
    assert bool(layer.convergence.converged.all())
    assert layer.convergence.iterations < 400


def test_the_inverse_says_when_it_did_not_converge():
    layer, x = residual(solver=FixedPoint(max_iterations=2)), torch.randn(6, 4)
    with torch.no_grad():
        back = layer.inverse(layer(x))
    assert layer.convergence.iterations == 2
    assert not bool(layer.convergence.converged.any())
    assert (back - x).norm() > 1e-6


def test_an_expansion_is_reported_and_does_not_raise():
    layer = Residual(nn.Linear(3, 3, bias=False), solver=FixedPoint(max_iterations=10_000))
    nn.init.constant_(layer.network.weight, 2.0)
    with torch.no_grad():
        layer.inverse(torch.ones(2, 3))
    assert not bool(layer.convergence.converged.any())
    assert layer.convergence.iterations < 10_000


def test_one_lost_sample_does_not_stop_the_others():
    layer, z = residual(), torch.randn(3, 4)
    z[1] = torch.nan
    with torch.no_grad():
        x = layer.inverse(z)
    assert layer.convergence.converged.tolist() == [True, False, True]
    assert torch.allclose(layer(x)[[0, 2]], z[[0, 2]], atol=1e-13)


def test_conditioned_copies_share_the_record():
    layer = residual()
    layer.with_context(None).inverse(torch.randn(2, 4))
    assert layer.convergence.iterations > 0
    copied = copy.deepcopy(layer)
    copied.inverse(torch.randn(5, 4))
    assert len(layer.convergence.converged) == 2


def test_gradient_of_the_inverse_is_the_implicit_one_and_once_only():
    layer, z = residual(), torch.randn(3, 4).requires_grad_()
    x = layer.inverse(z)
    u = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(x, z, u, create_graph=True)
    J = torch.stack(
        [torch.autograd.functional.jacobian(lambda p: layer(p[None])[0], row) for row in x.detach()]
    )
    expected = torch.linalg.solve(J.mT, u.unsqueeze(2)).squeeze(2)
    assert torch.allclose(gradient, expected, atol=1e-12)
    with pytest.raises(NotApplicable, match="once, not twice"):
        torch.autograd.grad(gradient.sum(), z)


def test_linearized_products_equal_autograd():
    layer, x = residual(), torch.randn(3, 4)
    fast, slow = layer.linearize(x), AutogradJacobian(layer.forward, layer.inverse, x)
    v = torch.randn(3, 4)
    for product in ("jvp", "vjp", "inverse_vjp"):
        assert torch.allclose(
            getattr(fast, product)(v), getattr(slow, product)(v), rtol=1e-11, atol=1e-12
        )
    assert torch.allclose(fast.inverse_jvp(fast.jvp(v)), v, atol=1e-12)


def test_exact_log_det_is_that_of_the_jacobian_and_differentiable():
    layer, x = residual(), torch.randn(3, 4).requires_grad_()
    log_det = layer.forward_and_log_det(x)[1]
    J = torch.stack(
        [torch.autograd.functional.jacobian(lambda p: layer(p[None])[0], row) for row in x.detach()]
    )
    assert torch.allclose(log_det, torch.linalg.slogdet(J).logabsdet, atol=1e-12)
    (gradient,) = torch.autograd.grad(log_det.sum(), x)
    assert bool((gradient != 0).any())
    with torch.no_grad():
        assert not layer.forward_and_log_det(x)[1].requires_grad


def test_truncated_series_is_within_its_bias_and_noise():
    layer, x = residual(0.7), torch.randn(1, 4)
    exact = ExactLogDet()(layer.residual, x)[1]
    many = PowerSeries(terms=20)(layer.residual, x.expand(20_000, 4))[1].detach()
    c = 0.49
    bias = 4 * c**21 / (21 * (1 - c))
    assert (many.mean() - exact).abs() <= bias + 4.5 * many.std() / math.sqrt(len(many))


def test_russian_roulette_is_unbiased_where_the_truncated_series_is_not():
    A = 0.8 * torch.linalg.qr(torch.randn(3, 3)).Q
    A = (A @ torch.diag(torch.tensor([1.0, 0.7, 0.4])) @ A.T) / 0.8
    exact = torch.linalg.slogdet(torch.eye(3) + A).logabsdet
    x = torch.zeros(400, 3)

    def means(estimator, calls):
        return torch.stack(
            [estimator.train()(lambda x: x @ A.T, x)[1].mean() for _ in range(calls)]
        ).detach()

    draws = means(RussianRoulette(exact_terms=1, stop=0.3), 400)
    standard_error = draws.std() / math.sqrt(len(draws))
    assert (draws.mean() - exact).abs() <= 4.5 * standard_error
    assert (means(PowerSeries(terms=2), 40).mean() - exact).abs() > 9 * standard_error


def test_estimators_repeat_in_evaluation_move_on_in_training_and_resume():
    layer, x = residual(log_det=RussianRoulette(seed=5)), torch.randn(2, 4)
    layer.eval()
    state = torch.get_rng_state()
    first = layer.forward_and_log_det(x)[1]
    assert torch.equal(layer.forward_and_log_det(x)[1], first)
    layer.train()
    drawn = [layer.forward_and_log_det(x)[1] for _ in range(2)]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.get_rng_state(), state)
    copied = residual(log_det=RussianRoulette(seed=5))
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied.train().forward_and_log_det(x)[1], layer.forward_and_log_det(x)[1])


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="positive coefficient"):
        Contraction(0.0)
    with pytest.raises(ValueError, match="stride, dilation and groups 1"):
        contractive(nn.Conv2d(2, 2, 3, stride=2), coefficient=0.9)
    with pytest.raises(ValueError, match="at least one term"):
        PowerSeries(terms=0)
    with pytest.raises(ValueError, match="stop"):
        RussianRoulette(stop=1.0)
    assert isinstance(contractive_conv_net(2, 3, coefficient=0.9), nn.Sequential)
