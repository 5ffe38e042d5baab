"""Every rule of our own layers against sampled Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inn_guard.layers.actnorm import ActNorm, Diagonal
from inn_guard.layers.autoregressive import MADE, MaskedAutoregressive
from inn_guard.layers.chain import Chain
from inn_guard.layers.contraction import contractive_mlp
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.linear import InvertibleLinear, LULinear
from inn_guard.layers.multiscale import FactorOut, OnRemaining
from inn_guard.layers.networks import MLP, Conditional, ConvNet
from inn_guard.layers.ode import FixedStep, NeuralODE, RungeKutta
from inn_guard.layers.partition import Halves, Mask
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.reshape import Flatten, Squeeze
from inn_guard.layers.residual import Residual
from inn_guard.layers.scales import (
    ClampedScale,
    ExpScale,
    SigmoidScale,
    SoftplusScale,
    squashed_sigmoid,
)
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.maps.base import bounded_map
from inn_guard.numerics.intervals import Box
from tests.cases.trials import first
from tests.lipschitz.soundness import EFFORT, assert_sound

SCALES = [
    SigmoidScale(lower=1e-3, upper=1.001),
    squashed_sigmoid(),
    ClampedScale(1.0),
    ExpScale(),
    SoftplusScale(1e-2),
]


def box4() -> Box:
    return Box(-1.5 * torch.ones(4), torch.ones(4))


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = MLP([4, 8, 4], activation=nn.Tanh)

    def forward(self, t, x):
        return self.net(x)


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "partition",
    first(1, [Halves(), Halves(swapped=True), Mask(torch.tensor([True, False, True, False]))]),
)
def test_affine_couplings(scale, partition):
    full = isinstance(partition, Mask)
    layer = AffineCoupling(
        MLP([4 if full else 2, 8, 8 if full else 4], activation=nn.GELU),
        partition=partition,
        scale=scale,
    )
    assert_sound(layer, box4())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Softplus])
def test_additive_couplings_globally(activation):
    layer = AdditiveCoupling(MLP([2, 8, 8, 2], activation=activation))
    assert assert_sound(layer, Box.everywhere((4,))).is_global
    assert_sound(layer, box4())


def test_images():
    image = Box(torch.zeros(4, 4, 4), torch.ones(4, 4, 4))
    checkerboard = (torch.arange(4)[:, None] + torch.arange(4)).remainder(2).bool().expand(4, 4, 4)
    for layer in (
        AdditiveCoupling(ConvNet(2, 6, 2, activation=nn.ELU)),
        AffineCoupling(ConvNet(2, 6, 4), scale=SigmoidScale(lower=0.5)),
        AffineCoupling(ConvNet(4, 6, 8), partition=Mask(checkerboard), scale=squashed_sigmoid()),
        InvertibleLinear(4),
        Squeeze(),
        Flatten((4, 4, 4)),
        FactorOut((4, 4, 4)),
    ):
        assert_sound(layer, image, count=6)
    assert_sound(
        AdditiveCoupling(ConvNet(2, 6, 2, activation=nn.ELU)), Box.everywhere((4, 4, 4)), count=6
    )


@pytest.mark.parametrize(
    "layer",
    [
        lambda: InvertibleLinear(4),
        lambda: LULinear(4),
        lambda: Diagonal(4),
        lambda: ActNorm(4).eval(),
        lambda: Permutation.reverse(4),
        lambda: OnRemaining(InvertibleLinear(2), shape=(2,)),
        lambda: InverseLayer(LULinear(4)),
        lambda: Residual(contractive_mlp([4, 8, 4], coefficient=0.7)),
        lambda: NeuralODE(Field(), solver=FixedStep(4, RungeKutta.RK4)),
    ],
)
def test_global_layers(layer):
    layer = layer()
    for parameter in layer.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        assert assert_sound(layer, Box.everywhere((4,))).is_global


def test_masked_autoregressive():
    network = MADE(4, hidden=8, blocks=1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    assert_sound(MaskedAutoregressive(network), box4())


@pytest.mark.parametrize(
    "inner",
    [
        lambda: AdditiveCoupling(MLP([2, 8, 2], activation=nn.SiLU)),
        lambda: AffineCoupling(MLP([2, 8, 4]), scale=squashed_sigmoid()),
        lambda: AffineCoupling(
            MLP([4, 8, 8]), partition=Mask(torch.tensor([True, False, False, True]))
        ),
        lambda: MaskedAutoregressive(MADE(4, hidden=8, blocks=1)),
        lambda: Diagonal(4),
        lambda: LULinear(4),
    ],
)
def test_inverses_on_boxes(inner):
    layer = InverseLayer(inner())
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() == 1 else parameter.data.mul_(1.2)
    with torch.no_grad():
        assert_sound(layer, Box(-torch.ones(4), 0.5 * torch.ones(4)))
        image = Box(torch.zeros(4, 4, 4), torch.ones(4, 4, 4))
    assert_sound(
        InverseLayer(AffineCoupling(ConvNet(2, 6, 4), scale=squashed_sigmoid())), image, count=6
    )


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: Chain(InverseLayer(Flatten((2, 2, 2))), Squeeze()), 8),
        (
            lambda: InverseLayer(
                Chain(Squeeze(), AdditiveCoupling(ConvNet(2, 6, 2)), Flatten((4, 1, 1)))
            ),
            4,
        ),
        (lambda: InverseLayer(Chain(Permutation.reverse(8), Diagonal(8))), 8),
    ],
)
def test_inverses_may_change_the_shape(make, size):
    model = make()
    bounds = lipschitz_bounds(model, Box(-torch.ones(size), torch.ones(size)), seconds=2.0)
    assert bounds.lower_forward <= bounds.forward < math.inf
    assert bounds.lower_inverse <= bounds.inverse < math.inf


def test_logit_on_a_box_and_everywhere():
    assert_sound(Logit(0.05), Box(torch.zeros(4), torch.ones(4)))
    assert (
        bounded_map(Logit(0.05), Logit(0.05)).bounds(Box.everywhere((4,)), EFFORT).forward
        == math.inf
    )


def test_a_context_counts_as_a_constant():
    layer = AdditiveCoupling(Conditional(MLP([5, 8, 2], activation=nn.SiLU)))
    with_context = layer.with_context(torch.randn(1, 3).expand(60, 3))
    assert_sound(with_context, Box.everywhere((4,)))


def test_expansive_residuals_have_no_bounded_inverse():
    network = MLP([4, 8, 4])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8)
    bounds = bounded_map(Residual(network), Residual(network)).bounds(Box.everywhere((4,)), EFFORT)
    assert math.isfinite(bounds.forward)
    assert bounds.inverse == math.inf
    assert "not below one" in bounds.reason
