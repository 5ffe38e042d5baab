"""Jacobians of normflows', zuko's and MemCNN's layers against autograd, to 1e-12."""

from __future__ import annotations

import memcnn
import normflows as nf
import pytest
import torch
import zuko
from torch import nn
from zuko import transforms as T
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.lazy import UnconditionalTransform

from inn_guard.adapters import wrap
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.jacobian.checks import dense_jacobian
from tests.oracles import transforms as reference

PRODUCTS = ["jvp", "vjp", "inverse_jvp", "inverse_vjp"]


def block(inner: int, outer: int, **settings) -> nn.Module:
    return nf.flows.AffineCouplingBlock(nf.nets.MLP([inner, 12, outer], leaky=0.1), **settings)


def image_block(mode: str) -> nn.Module:
    return nf.flows.AffineCouplingBlock(
        nf.nets.ConvNet2d([2, 6, 4], [3, 1], leaky=0.1), split_mode=mode
    )


def masked(**nets: nn.Module) -> nn.Module:
    return nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]), **nets)


def mlp() -> nn.Module:
    return nf.nets.MLP([5, 8, 5], leaky=0.1)


def actnorm(*shape: int) -> nn.Module:
    module = nf.flows.ActNorm(shape)
    module.data_dep_init_done.fill_(1.0)
    return module


def coupling(context: int = 0, **settings) -> nn.Module:
    return GeneralCouplingTransform(
        5, context, hidden_features=(8,), activation=nn.Tanh, **settings
    )


def half(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))


def wrapper() -> nn.Module:
    return memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)))


CASES = {
    "normflows exp": (lambda: block(3, 4), (5,), ()),
    "normflows sigmoid": (lambda: block(3, 4, scale_map="sigmoid"), (5,), ()),
    "normflows sigmoid_inv": (lambda: block(3, 4, scale_map="sigmoid_inv"), (5,), ()),
    "normflows swapped": (lambda: block(2, 6, split_mode="channel_inv"), (5,), ()),
    "normflows additive": (lambda: block(3, 2, scale=False), (5,), ()),
    "normflows image": (lambda: image_block("channel"), (4, 3, 2), ()),
    "normflows image, swapped": (lambda: image_block("channel_inv"), (4, 3, 2), ()),
    "normflows masked": (lambda: masked(t=mlp(), s=mlp()), (5,), ()),
    "normflows masked, additive": (lambda: masked(t=mlp()), (5,), ()),
    "normflows constant": (lambda: nf.flows.AffineConstFlow(5), (5,), ()),
    "normflows actnorm, image": (lambda: actnorm(4, 1, 1), (4, 3, 2), ()),
    "normflows shuffle": (lambda: nf.flows.Permute(5), (5,), ()),
    "normflows swap": (lambda: nf.flows.Permute(5, "swap"), (5, 3, 2), ()),
    "normflows affine": (lambda: nf.flows.InvertibleAffine(5), (5,), ()),
    "normflows affine, full": (lambda: nf.flows.InvertibleAffine(5, use_lu=False), (5,), ()),
    "normflows convolution": (lambda: nf.flows.Invertible1x1Conv(4, use_lu=True), (4, 3, 2), ()),
    "normflows LU": (lambda: nf.flows.LULinearPermute(5, identity_init=False), (5,), ()),
    "zuko affine": (coupling, (5,), ()),
    "zuko affine, context": (lambda: coupling(3), (5,), (3,)),
    "zuko additive": (lambda: coupling(univariate=T.AdditiveTransform, shapes=[()]), (5,), ()),
    "zuko mask": (lambda: coupling(mask=[True, True, False, True, False]), (5,), ()),
    "zuko permutation": (
        lambda: UnconditionalTransform(T.PermutationTransform, torch.randperm(5), buffer=True),
        (5,),
        (),
    ),
    "zuko rotation": (
        lambda: UnconditionalTransform(T.RotationTransform, torch.randn(5, 5)),
        (5,),
        (),
    ),
    "zuko LU": (lambda: UnconditionalTransform(T.LULinearTransform, torch.eye(5)), (5,), ()),
    "MemCNN additive": (lambda: memcnn.AdditiveCoupling(half(), half()), (6,), ()),
    "MemCNN naive": (
        lambda: memcnn.AffineCoupling(half(), half(), adapter=memcnn.AffineAdapterNaive),
        (6,),
        (),
    ),
    "MemCNN sigmoid": (
        lambda: memcnn.AffineCoupling(half(6), half(6), adapter=memcnn.AffineAdapterSigmoid),
        (6,),
        (),
    ),
    "zuko spline": (
        lambda: coupling(univariate=T.MonotonicRQSTransform, shapes=[(4,), (4,), (3,)]),
        (5,),
        (),
    ),
    "zuko autoregressive": (lambda: zuko.flows.MaskedAutoregressiveTransform(5), (5,), ()),
    "MemCNN wrapped": (
        lambda: memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(half(), half())),
        (6,),
        (),
    ),
}


@pytest.fixture(params=CASES)
def layer_and_x(request):
    make, shape, context = CASES[request.param]
    torch.manual_seed(0)
    module = make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return wrap(module, context=torch.randn(4, *context) if context else None), torch.randn(
        4, *shape
    )


def test_products_equal_autograd_to_1e_12(layer_and_x):
    layer, x = layer_and_x
    fast, slow = layer.linearize(x), AutogradJacobian(layer.forward, layer.inverse, x)
    assert not isinstance(fast, AutogradJacobian)
    assert torch.allclose(fast.output, slow.output, rtol=1e-12, atol=1e-13)
    for product in PRODUCTS:
        vector = torch.randn_like(x)
        actual, expected = getattr(fast, product)(vector), getattr(slow, product)(vector)
        assert actual.shape == expected.shape
        assert (actual - expected).norm() <= 1e-11 * expected.norm(), product


def test_many_vectors_at_once_make_the_dense_jacobian(layer_and_x):
    layer, x = layer_and_x
    J = reference.jacobian(layer.forward, x)
    torch.testing.assert_close(dense_jacobian(layer.linearize(x), x), J, rtol=1e-10, atol=1e-11)


DIFFERENT = {
    "normflows checkerboard": lambda: (image_block("checkerboard"), (2, 2, 2)),
    "normflows uninitialised": lambda: (nf.flows.ActNorm(5), (5,)),
    "normflows half-open mask": lambda: (
        nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0.5, 0.0, 1.0, 0.0]), mlp(), mlp()),
        (5,),
    ),
    "MemCNN wrapper inside": lambda: (memcnn.AdditiveCoupling(wrapper(), nn.Linear(4, 4)), (8,)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_not_known_is_left_to_autograd(name):
    module, shape = DIFFERENT[name]()
    layer = wrap(module.double())
    assert isinstance(layer.linearize(torch.randn(3, *shape)), AutogradJacobian)


def test_a_subclass_that_does_something_else_is_noticed():
    class Tripled(nf.flows.AffineCouplingBlock):
        def inverse(self, z):
            z, log_det = super().inverse(z)
            return 3 * z, log_det

    layer = wrap(Tripled(nf.nets.MLP([3, 8, 4])).double())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert isinstance(layer.linearize(torch.randn(3, 5)), AutogradJacobian)
