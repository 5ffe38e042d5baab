"""Every linearize of our own layers against autograd, to rounding."""

from __future__ import annotations

import pytest
import torch

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.layers.coupling import CouplingJacobian
from inn_guard.layers.linear import ElementwiseJacobian, LinearMapJacobian
from tests.cases.layers import CASES

OWN = [
    case
    for case in CASES
    if type(case.make()[0]).linearize is not Invertible.linearize
    and "residual" not in case.id
    and case.bijective
]
PRODUCTS = ["jvp", "vjp", "inverse_jvp", "inverse_vjp"]


def test_the_layers_with_a_jacobian_of_their_own_are_here():
    assert len(OWN) >= 18


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.id)
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_equal_autograd_to_1e_12(case, product):
    layer, x = case.make()
    fast, slow = layer.linearize(x), AutogradJacobian(layer.forward, layer.inverse, x)
    assert torch.allclose(fast.output, slow.output, rtol=1e-12, atol=1e-13)
    vector = torch.randn_like(x if product in ("jvp", "inverse_vjp") else fast.output)
    actual, expected = getattr(fast, product)(vector), getattr(slow, product)(vector)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.id)
def test_a_leading_dimension_is_that_many_products(case):
    layer, x = case.make()
    jacobian = layer.linearize(x)
    for product in PRODUCTS:
        like = x if product in ("jvp", "inverse_vjp") else jacobian.output
        many = torch.randn(3, *like.shape)
        together = getattr(jacobian, product)(many)
        for row, vector in zip(together, many, strict=True):
            assert torch.allclose(row, getattr(jacobian, product)(vector), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.id)
def test_no_graph_is_kept(case):
    layer, x = case.make()
    jacobian = layer.linearize(x.requires_grad_())
    assert isinstance(jacobian, (CouplingJacobian, LinearMapJacobian, ElementwiseJacobian))
    assert not jacobian.output.requires_grad
    assert not jacobian.jvp(torch.randn_like(x)).requires_grad


def test_condition_beyond_float32_is_kept_by_the_inverse_product():
    """J^-1 u of a stack whose inverse is not finite in float32 any more."""
    from inn_guard.jacobian.chain import Linearization
    from inn_guard.layers.chain import Chain
    from inn_guard.layers.coupling import AffineCoupling
    from inn_guard.layers.networks import MLP
    from inn_guard.layers.permutation import Permutation
    from inn_guard.layers.scales import ExpScale

    layers: list[Invertible] = []
    for _ in range(12):
        coupling = AffineCoupling.on_halves(
            4, lambda kept, out: MLP([kept, 16, out]), scale=ExpScale()
        )
        torch.nn.init.constant_(coupling.network[-1].bias, -8.0)
        layers += [coupling, Permutation.reverse(4)]
    model, x = Chain(*layers), torch.randn(3, 4)
    u = torch.randn(3, 4)
    double = Linearization(model, x).inverse_jvp(u)
    single = Linearization(model.to_dtype(torch.float32), x.float()).inverse_jvp(u.float())
    assert double.log_norm().min() > 20 * 2.3
    assert torch.allclose(single.log_norm(), double.log_norm(), atol=1e-3)
