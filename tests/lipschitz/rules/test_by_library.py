"""Every rule of normflows, zuko and MemCNN against sampled Jacobians."""

from __future__ import annotations

import math
from functools import partial

import memcnn
import normflows as nf
import pytest
import torch
import zuko
from torch import nn
from zuko import transforms as T
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.lazy import UnconditionalTransform

import inn_guard as ig
from inn_guard.lipschitz.maps.base import NoRule, bounded_map
from inn_guard.numerics.intervals import Box
from tests.cases.trials import first, trials
from tests.lipschitz.soundness import EFFORT, assert_sound, jacobians


def mlp(inner: int, outer: int) -> nn.Module:
    return nf.nets.MLP([inner, 8, outer], leaky=0.2)


def block(outer: int = 4, **settings) -> nn.Module:
    return nf.flows.AffineCouplingBlock(mlp(2, outer), **settings)


def masked(**nets: nn.Module) -> nn.Module:
    return nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0.0, 0.0, 1.0]), **nets)


def actnorm() -> nn.Module:
    module = nf.flows.ActNorm(4)
    module.data_dep_init_done.fill_(1.0)
    return module


def coupling(context: int = 0, **settings) -> nn.Module:
    return GeneralCouplingTransform(
        4, context, hidden_features=(8,), activation=nn.Tanh, **settings
    )


def rational(kind, **options) -> nn.Module:
    univariate = partial(T.MonotonicRQSTransform, **options) if options else T.MonotonicRQSTransform
    return kind(
        4,
        hidden_features=(8,),
        activation=nn.Tanh,
        univariate=univariate,
        shapes=[(4,), (4,), (3,)],
    )


def half(outer: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, outer))


def convolution(size: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, size, padding=size // 2), nn.Tanh())


LOCAL = {
    "normflows exp": block,
    "normflows sigmoid": lambda: block(scale_map="sigmoid"),
    "normflows sigmoid_inv": lambda: block(scale_map="sigmoid_inv"),
    "normflows additive": lambda: block(2, scale=False),
    "normflows swapped": lambda: block(split_mode="channel_inv"),
    "normflows masked": lambda: masked(s=mlp(4, 4), t=mlp(4, 4)),
    "normflows masked, additive": lambda: masked(t=mlp(4, 4)),
    "normflows spline": lambda: nf.flows.CoupledRationalQuadraticSpline(
        4, 1, 6, num_bins=4, tail_bound=2.0
    ),
    "normflows spline, autoregressive": lambda: nf.flows.AutoregressiveRationalQuadraticSpline(
        4, 1, 6, num_bins=4, tail_bound=2
    ),
    "normflows affine, autoregressive": lambda: nf.flows.MaskedAffineAutoregressive(
        4, 6, num_blocks=1
    ),
    "normflows constant": lambda: nf.flows.AffineConstFlow(4),
    "normflows actnorm": actnorm,
    "normflows shuffle": lambda: nf.flows.Permute(4),
    "normflows swap": lambda: nf.flows.Permute(4, "swap"),
    "normflows affine": lambda: nf.flows.InvertibleAffine(4),
    "normflows LU": lambda: nf.flows.LULinearPermute(4, identity_init=False),
    "normflows shift": lambda: nf.transforms.Shift(0.4),
    "zuko affine": coupling,
    "zuko affine, slope": lambda: coupling(
        univariate=partial(T.MonotonicAffineTransform, slope=0.1)
    ),
    "zuko additive": lambda: coupling(univariate=T.AdditiveTransform, shapes=[()]),
    "zuko affine, autoregressive": lambda: zuko.flows.MaskedAutoregressiveTransform(
        4, hidden_features=(8,)
    ),
    "zuko spline": lambda: rational(GeneralCouplingTransform),
    "zuko spline, bound and slope": lambda: rational(
        GeneralCouplingTransform, bound=2.0, slope=0.05
    ),
    "zuko spline, autoregressive": lambda: rational(zuko.flows.MaskedAutoregressiveTransform),
    "zuko fixed spline": lambda: UnconditionalTransform(
        T.MonotonicRQSTransform, torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 4), bound=2.0
    ),
    "zuko rotation": lambda: UnconditionalTransform(T.RotationTransform, torch.randn(4, 4)),
    "zuko LU": lambda: UnconditionalTransform(T.LULinearTransform, torch.eye(4)),
    "zuko permutation": lambda: UnconditionalTransform(
        T.PermutationTransform, torch.randperm(4), buffer=True
    ),
    "zuko constant": lambda: UnconditionalTransform(
        T.MonotonicAffineTransform, torch.randn(4), torch.randn(4)
    ),
    "zuko shift": lambda: UnconditionalTransform(T.AdditiveTransform, torch.randn(4)),
    "zuko softclip": lambda: UnconditionalTransform(T.SoftclipTransform, bound=2.0),
    "MemCNN additive": lambda: memcnn.AdditiveCoupling(half(), half()),
    "MemCNN naive": lambda: memcnn.AffineCoupling(
        half(), half(), adapter=memcnn.AffineAdapterNaive
    ),
    "MemCNN sigmoid": lambda: memcnn.AffineCoupling(
        half(4), half(4), adapter=memcnn.AffineAdapterSigmoid
    ),
    "MemCNN wrapped": lambda: memcnn.InvertibleModuleWrapper(
        memcnn.AdditiveCoupling(half(), half())
    ),
}


def shaken(module: nn.Module, std: float) -> nn.Module:
    module = module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    if isinstance(module, UnconditionalTransform) and module.f is T.LULinearTransform:
        module._0.data += torch.eye(4)
    return module.eval()


#: seconds a trial: one, of wide parameters on the smaller box
SLOW = {
    "normflows affine, autoregressive",
    "zuko spline",
    "zuko spline, bound and slope",
    "zuko spline, autoregressive",
}


@trials(1, 3)
@pytest.mark.parametrize(
    "name", first(len(LOCAL) - len(SLOW), sorted(LOCAL, key=lambda name: name in SLOW))
)
def test_vectors_on_boxes(name, trials):
    for trial in range(trials):
        layer = ig.wrap(shaken(LOCAL[name](), 0.1 + 0.2 * trial))
        size = 1.5 if trial % 2 else 3.0
        box = Box(-size * torch.ones(4), 0.7 * size * torch.ones(4))
        assert_sound(layer, box, count=1000)


@pytest.mark.parametrize(
    "name", ["normflows additive", "normflows masked, additive", "zuko additive", "MemCNN additive"]
)
def test_additive_couplings_have_global_bounds(name):
    layer = ig.wrap(shaken(LOCAL[name](), 0.5))
    assert assert_sound(layer, Box.everywhere((4,))).is_global


IMAGES = {
    "coupling": lambda: nf.flows.AffineCouplingBlock(
        nf.nets.ConvNet2d([2, 4, 4], [3, 1], leaky=0.1)
    ),
    "convolution": lambda: nf.flows.Invertible1x1Conv(4, use_lu=True),
    "full convolution": lambda: nf.flows.Invertible1x1Conv(4),
    "squeeze": nf.flows.Squeeze,
    "constant": lambda: nf.flows.AffineConstFlow((4, 1, 1)),
    "MemCNN": lambda: memcnn.AdditiveCoupling(convolution(3), convolution(1)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    layer = ig.wrap(shaken(IMAGES[name](), 0.3))
    assert_sound(layer, Box(-torch.ones(4, 4, 4), torch.ones(4, 4, 4)), count=10)


def test_unit_splines_and_logits():
    inside = Box(0.05 * torch.ones(4), 0.95 * torch.ones(4))
    spline = nf.flows.CoupledRationalQuadraticSpline(4, 1, 6, num_bins=4, tails=None)
    assert_sound(ig.wrap(shaken(spline, 0.2)), inside)
    assert_sound(ig.wrap(nf.transforms.Logit(0.05)), inside)


CONDITIONAL = {
    "zuko coupling": lambda: coupling(3),
    "zuko autoregressive": lambda: zuko.flows.MaskedAutoregressiveTransform(
        4, 3, hidden_features=(8,)
    ),
    "normflows spline": lambda: nf.flows.CoupledRationalQuadraticSpline(
        4, 1, 6, num_context_channels=3, num_bins=4
    ),
}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_layers_hold_for_every_row_of_the_context(name):
    module, contexts = shaken(CONDITIONAL[name](), 0.2), torch.randn(3, 3)
    box = Box(-torch.ones(4), torch.ones(4))
    described = bounded_map(module, ig.wrap(module, context=contexts))
    bounds = described.bounds(box, EFFORT)
    for context in contexts:
        layer = ig.wrap(module, context=context.expand(50, 3))
        x = 2 * torch.rand(50, 4) - 1
        sigma = torch.linalg.svdvals(jacobians(layer, x))
        assert float(sigma[:, 0].max()) <= bounds.forward
        assert float((1 / sigma[:, -1]).max()) <= bounds.inverse


UNKNOWN = {
    "circular spline of zuko": lambda: (
        zuko.flows.NCSF(4, bins=4, transforms=1, hidden_features=(8,)).transform
    ),
    "checkerboard": lambda: nf.flows.AffineCouplingBlock(
        nf.nets.ConvNet2d([4, 8], [1]), split_mode="checkerboard"
    ),
    "scale without translation": lambda: masked(s=mlp(4, 4)),
    "circular": lambda: nf.flows.CircularCoupledRationalQuadraticSpline(4, 1, 6, [0]),
    "Bernstein polynomial": lambda: UnconditionalTransform(T.BernsteinTransform, torch.randn(4, 8)),
    "adapter of one's own": lambda: memcnn.AffineCoupling(half(), half()),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_rule_is_unknown_with_a_reason(name):
    layer = ig.wrap(shaken(UNKNOWN[name](), 0.2))
    described = bounded_map(layer.block, layer)
    assert isinstance(described, NoRule)
    assert described.reason


def test_a_residual_is_bounded_by_its_network():
    residual = nf.flows.Residual(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)))
    for parameter in residual.parameters():
        parameter.data.mul_(0.2)
    layer = ig.wrap(residual.double().eval())
    bounds = bounded_map(layer.block, layer).bounds(Box.everywhere((4,)), EFFORT)
    assert 1 < bounds.inverse < math.inf
    J = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], torch.randn(4))
    sigma = torch.linalg.svdvals(J)
    assert sigma[0] <= bounds.forward
    assert 1 / sigma[-1] <= bounds.inverse
