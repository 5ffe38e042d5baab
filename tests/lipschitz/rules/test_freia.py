"""Every rule of FrEIA against sampled Jacobians."""

from __future__ import annotations

import math

import FrEIA.modules as Ff
import pytest
import torch
from torch import nn

import inn_guard as ig
from inn_guard.lipschitz.maps.base import bounded_map
from inn_guard.lipschitz.rules import freia as bounds_freia  # noqa: F401 - registers the rules
from inn_guard.numerics.intervals import Box
from tests.cases.trials import trials
from tests.lipschitz.soundness import EFFORT, assert_sound

VECTOR, IMAGE = [(4,)], [(4, 4, 4)]


def net(inner: int, outer: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inner, 8), nn.SiLU(), nn.Linear(8, outer))


def conv_net(inner: int, outer: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inner, 6, 3, padding=1), nn.ELU(), nn.Conv2d(6, outer, 3, padding=1)
    )


def invertible() -> torch.Tensor:
    return torch.randn(4, 4) + 2 * torch.eye(4)


VECTORS = {
    "nice": lambda: Ff.NICECouplingBlock(VECTOR, subnet_constructor=net),
    "rnvp atan": lambda: Ff.RNVPCouplingBlock(VECTOR, subnet_constructor=net),
    "rnvp tanh": lambda: Ff.RNVPCouplingBlock(
        VECTOR, subnet_constructor=net, clamp_activation="TANH"
    ),
    "glow sigmoid": lambda: Ff.GLOWCouplingBlock(
        VECTOR, subnet_constructor=net, clamp_activation="SIGMOID", clamp=1.0
    ),
    "one sided": lambda: Ff.AffineCouplingOneSided(VECTOR, subnet_constructor=net, split_len=1),
    "all in one": lambda: Ff.AllInOneBlock(VECTOR, subnet_constructor=net),
    "all in one soft": lambda: Ff.AllInOneBlock(
        VECTOR, subnet_constructor=net, permute_soft=True, reverse_permutation=True
    ),
    "all in one householder": lambda: Ff.AllInOneBlock(
        VECTOR, subnet_constructor=net, learned_householder_permutation=2
    ),
    "gin": lambda: Ff.GINCouplingBlock(VECTOR, subnet_constructor=net),
    "all in one gin": lambda: Ff.AllInOneBlock(VECTOR, subnet_constructor=net, gin_block=True),
    "permute": lambda: Ff.PermuteRandom(VECTOR, seed=1),
    "fixed linear": lambda: Ff.FixedLinearTransform(VECTOR, M=invertible(), b=torch.randn(4)),
    "householder": lambda: Ff.HouseholderPerm(VECTOR, n_reflections=2),
    "sigmoid": lambda: Ff.InvertibleSigmoid(VECTOR),
    "actnorm": lambda: Ff.ActNorm(VECTOR),
    "auto act": lambda: Ff.InvAutoAct(VECTOR),
    "scaling": lambda: Ff.LearnedElementwiseScaling(VECTOR),
}
IMAGES = {
    "glow": lambda: Ff.GLOWCouplingBlock(IMAGE, subnet_constructor=conv_net),
    "nice": lambda: Ff.NICECouplingBlock(IMAGE, subnet_constructor=conv_net),
    "all in one": lambda: Ff.AllInOneBlock(IMAGE, subnet_constructor=conv_net),
    "fixed conv": lambda: Ff.Fixed1x1Conv(IMAGE, M=invertible()),
    "haar": lambda: Ff.HaarDownsampling(IMAGE, rebalance=1.3),
    "revnet": lambda: Ff.IRevNetDownsampling(IMAGE),
    "flatten": lambda: Ff.Flatten(IMAGE),
    "permute": lambda: Ff.PermuteRandom(IMAGE),
}


def shaken(block: nn.Module, std: float) -> nn.Module:
    for parameter in block.parameters():
        if parameter.requires_grad and "house" not in type(block).__name__.lower():
            nn.init.normal_(parameter, std=std)
    return block.double().eval()


@trials(1, 2)
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_on_boxes(name, trials):
    for std in (0.2, 0.5)[:trials]:
        layer = ig.wrap(shaken(VECTORS[name](), std))
        layer(
            torch.randn(8, 4)
        )  # an ActNorm initialises itself from the first batch, even in evaluation mode
        assert_sound(layer, Box(-1.5 * torch.ones(4), torch.ones(4)))


@pytest.mark.parametrize(
    "name", ["nice", "permute", "fixed linear", "householder", "actnorm", "auto act", "scaling"]
)
def test_global_bounds(name):
    layer = ig.wrap(shaken(VECTORS[name](), 0.5))
    layer(torch.randn(8, 4))
    assert assert_sound(layer, Box.everywhere((4,))).is_global


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    layer = ig.wrap(shaken(IMAGES[name](), 0.3))
    assert_sound(layer, Box(-torch.ones(4, 4, 4), torch.ones(4, 4, 4)), count=6)


def test_contractive_residual_layer():
    block = Ff.IResNetLayer(VECTOR, internal_size=8)
    block = block.double()
    with torch.no_grad():
        for layer in block.layers:
            layer.weight.mul_(0.4)
    bounds = assert_sound(ig.wrap(block.eval()), Box.everywhere((4,)))
    assert bounds.inverse > 1


def test_conditions_are_constants():
    block = shaken(Ff.AllInOneBlock(VECTOR, dims_c=[(3,)], subnet_constructor=net), 0.5)
    context = torch.randn(1, 3)
    assert_sound(
        ig.wrap(block, context=[context.expand(68, 3)]), Box(-torch.ones(4), torch.ones(4))
    )
    affine = shaken(
        Ff.ConditionalAffineTransform(VECTOR, dims_c=[(3,)], subnet_constructor=net), 0.5
    )
    assert_sound(ig.wrap(affine, context=[context.expand(60, 3)]), Box.everywhere((4,)))


def test_unknown_clamps_and_gin_of_images_give_infinity_with_the_reason():
    own = Ff.GLOWCouplingBlock(VECTOR, subnet_constructor=net, clamp_activation=torch.sin)
    gin = Ff.GINCouplingBlock(IMAGE, subnet_constructor=conv_net)
    for block, word, shape in ((own, "clamp", (4,)), (gin, "GIN", (4, 4, 4))):
        layer = ig.wrap(block.double())
        bounds = bounded_map(layer.block, layer).bounds(Box.everywhere(shape), EFFORT)
        assert word in bounds.reason
        assert bounds.forward == math.inf
