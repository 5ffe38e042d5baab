"""Linearization against dense products, and beyond the range of floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inn_guard.jacobian.chain import Linearization, LogScaledVector
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling
from tests.cases.toys import Detached, Linear, ReverseOnly, Warp, random_chain
from tests.oracles.transforms import jacobian


def vectors(batch: int = 3, dimension: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(
        batch, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def assert_four_products(model, x, v, tolerance):
    J = jacobian(model.forward, x)
    linearization = Linearization(model, x)
    for product, matrix in (
        (linearization.jvp, J),
        (linearization.vjp, J.mT),
        (linearization.inverse_jvp, torch.linalg.inv(J)),
        (linearization.inverse_vjp, torch.linalg.inv(J).mT),
    ):
        expected = torch.einsum("bij,bj->bi", matrix, v)
        error = (product(v).value() - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < tolerance


def test_products_of_a_chain_are_those_of_its_jacobian():
    assert_four_products(random_chain(depth=4), vectors(), vectors(seed=2), 1e-9)


def test_a_model_without_layers_is_one_layer():
    model = Warp(6)
    assert len(Linearization(model, vectors()).layers) == 1
    assert_four_products(model, vectors(), vectors(seed=2), 1e-11)


def test_wrong_and_missing_derivatives_inside_a_chain_are_replaced():
    model = Chain(Warp(6), Detached(6, seed=1), ReverseOnly(), Warp(6, seed=2))
    assert_four_products(model, vectors(), vectors(seed=2), 1e-10)


class SelectedOutputs:
    """A tangent z = 2 x whose J^-1 is wrong for every sample, and which can be taken apart."""

    def __init__(self, x):
        self.output, self.jvp, self.vjp = 2 * x, lambda v: 2 * v, lambda u: 2 * u
        self.inverse_jvp, self.inverse_vjp = lambda u: u / 3, lambda v: v / 3

    def select(self, rows):
        return SelectedOutputs(self.output[rows] / 2)


class WronglyInverted(Warp):
    """A layer with that tangent."""

    def linearize(self, x):
        return SelectedOutputs(x)


@pytest.mark.parametrize("finite", [20, 1, 0])
def test_a_few_finite_samples_speak_for_a_layer_that_can_be_taken_apart(finite):
    x, v = vectors(batch=20), vectors(batch=20, seed=2)
    x[: len(x) - finite] = math.nan
    product = Linearization(WronglyInverted(6), x).inverse_jvp(v).value()
    assert torch.allclose(product[len(x) - finite :], v[len(x) - finite :] / 2, rtol=1e-12)


def patched_network(model):
    network = model.layers()[0].network
    network[0].forward = lambda x: 5 * x.sin()


def patched_layer(model):
    layer, forward = model.layers()[0], model.layers()[0].forward
    layer.forward = lambda x: 2 * forward(x)
    inverse = layer.inverse
    layer.inverse = lambda z: inverse(z / 2)


def hooked_layer(model):
    model.layers()[0].register_forward_hook(lambda module, args, out: 3 * out)


@pytest.mark.parametrize("change", [patched_network, patched_layer, hooked_layer])
def test_hooks_and_patched_methods_count_as_in_a_call(change):
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3)
    ).double()
    model, x, v = Chain(AdditiveCoupling(network), Warp(6)), vectors(), vectors(seed=2)
    change(model)
    linearization = Linearization(model, x)
    assert torch.equal(linearization.output, model(x).detach())
    expected = torch.einsum("bij,bj->bi", jacobian(model, x), v)
    assert torch.allclose(linearization.jvp(v).value(), expected, rtol=1e-9)


def test_states_are_those_of_the_forward_pass():
    model, x = random_chain(depth=3), vectors()
    linearization = Linearization(model, x)
    for layer, before, after in zip(
        model.layers(), linearization.states, linearization.states[1:], strict=False
    ):
        assert torch.equal(layer(before).detach(), after)
    assert torch.equal(linearization.output, model(x).detach())
    assert not any(state.requires_grad for state in linearization.states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_beyond_the_range_of_floats(dtype):
    depth, factor = 60, 1e-9
    model = Chain(*(Linear(factor * torch.eye(4)) for _ in range(depth))).to_dtype(dtype)
    linearization = Linearization(model, torch.zeros(2, 4, dtype=dtype))
    v = torch.ones(2, 4, dtype=dtype)
    expected = depth * math.log(factor) + math.log(2)
    for product, sign in (
        (linearization.jvp, 1),
        (linearization.vjp, 1),
        (linearization.inverse_jvp, -1),
    ):
        log = product(v).log_norm()
        assert (log - (sign * (expected - math.log(2)) + math.log(2))).abs().max() < 1e-4
    assert linearization.jvp(v).value().abs().max() == 0
    assert linearization.inverse_jvp(v).value().isinf().all()


def test_zero_and_non_finite_vectors_stay_what_they_are():
    v = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [3.0, 4.0]])
    scaled = LogScaledVector.from_vector(v)
    assert scaled.log_norm()[0] == -math.inf
    assert scaled.log_norm()[1].isnan()
    assert not scaled.vector[2].isfinite().all()
    assert scaled.log_norm()[3].exp() == pytest.approx(5.0)
    assert scaled.vector[3].norm() == pytest.approx(1.0)


@given(
    st.lists(st.floats(min_value=-1e300, max_value=1e300), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_scaling_keeps_every_vector(entries, dtype):
    v = torch.tensor([entries], dtype=torch.float64).to(dtype)
    v = v[:, v[0].isfinite()]
    if v.numel() == 0:
        return
    scaled = LogScaledVector.from_vector(v)
    peak = v.double().abs().max()
    if peak == 0:
        assert torch.equal(scaled.vector, v)
        return
    exact = peak.log() + (v.double() / peak).norm().log()
    assert abs(scaled.log_norm().item() - exact.item()) < 1e-5 * max(1, abs(exact.item()))
    assert abs(scaled.vector.double().norm().item() - 1) < 1e-5


def test_linearization_leaves_the_input_alone():
    x = vectors().requires_grad_()
    kept = x.detach().clone()
    Linearization(random_chain(), x).jvp(vectors(seed=2))
    assert x.grad is None
    assert torch.equal(x.detach(), kept)
