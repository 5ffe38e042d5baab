"""Reachable sets: no sampled state outside, and boxes far smaller than intervals alone."""

from __future__ import annotations

import math

import FrEIA.modules as Ff
import pytest
import torch
from nflows.transforms import MaskedAffineAutoregressiveTransform
from torch import nn

import inn_guard as ig
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import MLP, ConvNet
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.reshape import Squeeze
from inn_guard.layers.scales import squashed_sigmoid
from inn_guard.lipschitz.lipsdp.multipliers import ROWS, fast_multipliers, optimise
from inn_guard.lipschitz.lipsdp.recursion import covering_factor
from inn_guard.lipschitz.maps.base import bounded_map
from inn_guard.lipschitz.networks.chain_builder import Torus
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.reachability import ReachableSet
from inn_guard.lipschitz.whole_network import LayerBounds, bound_layers
from inn_guard.numerics.convolution_norm import multiplicities, symbol
from inn_guard.numerics.intervals import Box, Interval
from tests.cases.trials import first
from tests.lipschitz.lipsdp.test_recursion import random_chain
from tests.lipschitz.soundness import sample

EFFORT = SearchBudget(steps=3, seconds=0.2)


def bounded_layers(model: Chain, box: Interval) -> LayerBounds:
    return bound_layers(
        [(layer.name, bounded_map(layer.block, layer)) for layer in model.layers()], box, EFFORT
    )


def shaken(layer: nn.Module, std: float) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=std)
    return layer.double()


def affine(blocks: int, std: float = 0.4) -> Chain:
    parts = []
    for _ in range(blocks):
        net = MLP([2, 8, 8, 4], activation=nn.SiLU)
        parts += [
            shaken(AffineCoupling(net, scale=squashed_sigmoid()), std),
            InvertibleLinear(4),
            Permutation.reverse(4),
        ]
    return Chain(*parts)


def freia(blocks: int) -> Chain:
    def net(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inner, 6), nn.Tanh(), nn.Linear(6, outer))

    kinds = (Ff.GLOWCouplingBlock, Ff.AllInOneBlock, Ff.RNVPCouplingBlock)
    return Chain(
        *(ig.wrap(shaken(kinds[k % 3]([(4,)], subnet_constructor=net), 0.3)) for k in range(blocks))
    )


def autoregressive(blocks: int) -> Chain:
    return Chain(
        *(
            ig.wrap(shaken(MaskedAffineAutoregressiveTransform(4, 6), 0.3).eval())
            for _ in range(blocks)
        )
    )


def images(padding_mode: str, coupling: type = AffineCoupling) -> Chain:
    parts = []
    for _ in range(3):
        net = ConvNet(2, 5, 4 if coupling is AffineCoupling else 2, activation=nn.ELU)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = padding_mode if module.kernel_size != (1, 1) else "zeros"
                module._reversed_padding_repeated_twice = [
                    p for p in reversed(module.padding) for _ in range(2)
                ]
        parts += [shaken(coupling(net), 0.25), Permutation.reverse(4)]
    return Chain(Squeeze(), *parts)


VECTORS = {
    "affine": lambda: affine(4),
    "freia": lambda: freia(3),
    "autoregressive": lambda: autoregressive(2),
}
PICTURES = {
    "zeros": lambda: images("zeros"),
    "circular": lambda: images("circular"),
    "additive": lambda: images("zeros", AdditiveCoupling),
}


def assert_states_inside(model: Chain, box: Interval, count: int) -> None:
    layers = bounded_layers(model, box)
    z = sample(box, count)
    with torch.no_grad():
        for layer, bounded in zip(model.layers(), layers, strict=True):
            slack = 1e-9 * (1 + z.abs())
            assert bool(((bounded.box.lo <= z + slack) & (z - slack <= bounded.box.hi)).all())
            z = layer(z)


@pytest.mark.parametrize("radius", first(1, [0.5, 1e-3]))
@pytest.mark.parametrize("name", VECTORS)
def test_no_state_of_a_vector_leaves_its_box(name, radius):
    torch.manual_seed(int(10 * radius))
    centre = torch.randn(4)
    assert_states_inside(VECTORS[name](), Box(centre - radius, centre + radius), 500)


@pytest.mark.thorough
@pytest.mark.parametrize("radius", first(1, [0.3, 1e-3]))
@pytest.mark.parametrize("name", PICTURES)
def test_no_state_of_an_image_leaves_its_box(name, radius):
    torch.manual_seed(2)
    centre = 0.5 * torch.randn(1, 6, 6)
    assert_states_inside(PICTURES[name](), Box(centre - radius, centre + radius), 100)


@pytest.mark.thorough
def test_the_reach_alone_holds_every_state():
    """Without the intervals, which could hide a reachable set that is too small."""
    for seed, make in enumerate((VECTORS["affine"], VECTORS["freia"], PICTURES["zeros"])):
        torch.manual_seed(seed)
        model = make()
        shape = (4,) if seed < 2 else (1, 6, 6)
        centre = 0.5 * torch.randn(shape)
        layers = bounded_layers(model, Box(centre - 0.1, centre + 0.1))
        reach, z = ReachableSet.around(layers[0].box), sample(layers[0].box, 200)
        for layer, bounded in zip(model.layers(), layers, strict=True):
            torus = Torus((3, 3), 1) if bounded.box.lo.dim() == 3 else None
            reach = ReachableSet(reach.centre, reach.ball, reach.factor, torus)
            try:
                reach = reach.through(bounded.map, bounded.box, EFFORT)
            except Unbounded:
                reach = reach.stretched(bounded.map, bounded.bounds.forward)
            z = layer(z).detach()
            inside = reach.box()
            assert bool(((inside.lo <= z + 1e-9) & (z - 1e-9 <= inside.hi)).all())


@pytest.mark.thorough
def test_it_is_far_tighter_than_intervals():
    torch.manual_seed(0)
    model, box = affine(8), Box(-0.01 * torch.ones(4), 0.01 * torch.ones(4))
    last, alone = bounded_layers(model, box)[-1].box, box
    for layer in model.layers()[:-1]:
        alone = bounded_map(layer.block, layer).image(alone)
    assert float(alone.radius.max()) > 5 * float(last.radius.max())


@pytest.mark.parametrize("frequencies", [1, 3])
def test_a_factor_covers_every_slope_vertex(frequencies):
    generator = torch.Generator().manual_seed(frequencies)
    for trial in range(16):
        chain = random_chain(generator, frequencies)
        multipliers = optimise(chain, steps=6, goal=ROWS) if trial % 2 else fast_multipliers(chain)
        factor = covering_factor(chain, multipliers)
        assert factor is not None
        for _ in range(12):
            slopes = [
                torch.where(torch.rand(len(k.lower), generator=generator) < 0.5, k.lower, k.upper)
                for k in chain.layers
            ]
            J = chain.jacobian(slopes)
            excess = torch.linalg.eigvalsh(J @ J.mH - factor @ factor.mH).max()
            assert float(excess) <= 1e-9 * float((J @ J.mH).abs().max() + 1)


@pytest.mark.parametrize("grid", [(4, 4), (5, 5), (4, 5), (5, 4), (6,), (7,)])
def test_a_row_of_a_circulant_is_the_mean_over_all_frequencies(grid):
    kernel = torch.randn(2, 3, *[3] * len(grid), generator=torch.Generator().manual_seed(1))
    matrices, _ = symbol(kernel, grid)
    weights = multiplicities(grid).double()
    assert int(weights.sum()) == math.prod(grid)
    assert len(weights) == len(matrices)
    mean = (weights[:, None] * matrices.abs().square().sum(2)).sum(0) / weights.sum()
    assert torch.allclose(mean, kernel.square().flatten(1).sum(1))


def test_nothing_is_known_of_unbounded_boxes():
    layers = bounded_layers(affine(2), Box.everywhere((4,)))
    assert not layers[-1].box.bounded
