"""Tangents of foreign layers of known structure against autograd, to 1e-12."""

from __future__ import annotations

import FrEIA.modules
import pytest
import torch
from nflows import transforms
from nflows.nn.nets import ConvResidualNet, ResidualNet
from torch import nn

from inn_guard.adapters import wrap
from inn_guard.adapters.structured_jacobians import is_jacobian_of, known_jacobian
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.layers.networks import MLP

MASK = torch.tensor([1, 0, 0, 1, 1])


def mlp(n: int, m: int) -> nn.Module:
    return MLP([n, 12, m], activation=nn.Tanh)


def convolutions(n: int, m: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n, 6, 3, padding=1), nn.ELU(), nn.Conv2d(6, m, 1))


def residual(n: int, m: int) -> nn.Module:
    return ResidualNet(n, m, 10, activation=torch.tanh)


def conditional(n: int, m: int) -> nn.Module:
    return ResidualNet(n, m, 10, context_features=3, activation=torch.tanh)


def freia(
    block: str, shape: tuple[int, ...] = (5,), conditions: tuple[int, ...] = (), **settings
) -> nn.Module:
    dims_c = [tuple(conditions)] if conditions else []
    subnet = convolutions if len(shape) == 3 else mlp
    module = getattr(FrEIA.modules, block)(
        [shape], dims_c=dims_c, subnet_constructor=subnet, **settings
    )
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


CASES = {
    "nflows affine": (lambda: transforms.AffineCouplingTransform(MASK, residual), (5,), ()),
    "nflows affine, context": (
        lambda: transforms.AffineCouplingTransform(MASK, conditional),
        (5,),
        (3,),
    ),
    "nflows affine, image": (
        lambda: transforms.AffineCouplingTransform(MASK, lambda n, m: ConvResidualNet(n, m, 4)),
        (5, 3, 2),
        (),
    ),
    "nflows additive": (lambda: transforms.AdditiveCouplingTransform(MASK, residual), (5,), ()),
    "nflows permutation": (lambda: transforms.RandomPermutation(5), (5,), ()),
    "nflows permutation of rows": (
        lambda: transforms.Permutation(torch.tensor([2, 0, 1]), dim=2),
        (5, 3, 2),
        (),
    ),
    "nflows LU": (lambda: transforms.LULinear(5, identity_init=False), (5,), ()),
    "FrEIA permutation": (lambda: FrEIA.modules.PermuteRandom([(5, 2, 3)], seed=1), (5, 2, 3), ()),
    "FrEIA GLOW": (lambda: freia("GLOWCouplingBlock"), (5,), ()),
    "FrEIA GLOW, image": (lambda: freia("GLOWCouplingBlock", (4, 3, 2)), (4, 3, 2), ()),
    "FrEIA GLOW, condition": (lambda: freia("GLOWCouplingBlock", conditions=(3,)), (5,), (3,)),
    "FrEIA GLOW, tanh": (lambda: freia("GLOWCouplingBlock", clamp_activation="TANH"), (5,), ()),
    "FrEIA RNVP": (lambda: freia("RNVPCouplingBlock"), (5,), ()),
    "FrEIA NICE": (lambda: freia("NICECouplingBlock"), (5,), ()),
    "FrEIA AllInOne": (lambda: freia("AllInOneBlock"), (5,), ()),
    "FrEIA AllInOne, soft": (lambda: freia("AllInOneBlock", permute_soft=True), (5,), ()),
    "FrEIA AllInOne, image": (lambda: freia("AllInOneBlock", (4, 3, 2)), (4, 3, 2), ()),
    "FrEIA AllInOne, condition": (lambda: freia("AllInOneBlock", conditions=(3,)), (5,), (3,)),
}
PRODUCTS = ["jvp", "vjp", "inverse_jvp", "inverse_vjp"]


@pytest.fixture(params=CASES)
def layer_and_x(request):
    make, shape, conditions = CASES[request.param]
    torch.manual_seed(0)
    context = torch.randn(4, *conditions) if conditions else None
    module = make().double()
    if hasattr(
        module, "w_perm"
    ):  # a rotation in float32: made one in float64, that the library's inverse is one
        U, _, V = torch.linalg.svd(module.w_perm.flatten(1))
        module.w_perm.data = (U @ V).reshape(module.w_perm.shape)
        module.w_perm_inv.data = (U @ V).T.reshape(module.w_perm.shape)
    layer = wrap(module, context=context)
    return layer, torch.randn(4, *shape)


def test_products_equal_autograd_to_1e_12(layer_and_x):
    layer, x = layer_and_x
    fast, slow = layer.linearize(x), AutogradJacobian(layer.forward, layer.inverse, x)
    assert not isinstance(fast, AutogradJacobian)
    assert torch.allclose(fast.output, slow.output, rtol=1e-12, atol=1e-13)
    for product in PRODUCTS:
        vector = torch.randn_like(x)
        actual, expected = getattr(fast, product)(vector), getattr(slow, product)(vector)
        assert actual.shape == expected.shape
        assert (actual - expected).norm() <= 1e-12 * expected.norm(), product


def test_a_class_that_does_something_else_is_left_to_autograd():
    class Tripled(transforms.AffineCouplingTransform):
        def _coupling_transform_forward(self, inputs, transform_params):
            outputs, log_det = super()._coupling_transform_forward(inputs, transform_params)
            return 3 * outputs, log_det

    layer, x = wrap(Tripled(MASK, residual).double()), torch.randn(4, 5)
    assert known_jacobian(layer.block, x, None) is None
    parent = known_jacobian(transforms.AffineCouplingTransform(MASK, residual).double(), x, None)
    assert not is_jacobian_of(parent, layer.forward, x)
    assert isinstance(layer.linearize(x), AutogradJacobian)


def test_a_hook_on_the_module_is_noticed():
    module = transforms.AffineCouplingTransform(MASK, residual).double()
    module.register_forward_hook(lambda module, inputs, output: (output[0].square(), output[1]))
    assert isinstance(wrap(module).linearize(torch.randn(4, 5)), AutogradJacobian)


def test_what_is_not_known_is_left_to_autograd():
    layer = wrap(freia("GINCouplingBlock").double())
    assert isinstance(layer.linearize(torch.randn(4, 5)), AutogradJacobian)
