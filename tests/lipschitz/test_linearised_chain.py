"""Linearised chains: no sampled ratio above, no state outside, and tight on narrow boxes."""

from __future__ import annotations

import math

import FrEIA.modules as Ff
import pytest
import torch
from torch import nn

import inn_guard as ig
from inn_guard.execution.deadline import Deadline
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import MLP, ConvNet
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.reshape import Squeeze
from inn_guard.layers.scales import squashed_sigmoid
from inn_guard.lipschitz import whole_network
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.linearised_chain import LinearisedChain, linearised
from inn_guard.lipschitz.maps.base import bounded_map
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Box
from tests.cases.trials import first
from tests.lipschitz.soundness import ROUNDING, jacobians, sample
from tests.lipschitz.test_reachability import shaken


def vectors(activation: type[nn.Module]) -> Chain:
    parts: list = []
    for _ in range(3):
        net = MLP([2, 6, 6, 4], activation=activation)
        coupling = shaken(AffineCoupling(net, scale=squashed_sigmoid()), 0.5)
        parts += [coupling, InvertibleLinear(4).double(), Diagonal(4).double()]
    return Chain(*parts, Permutation.reverse(4))


def images(channels: int = 4, *, affine: bool = True) -> Chain:
    parts: list = [Squeeze()]
    half = channels // 2
    for _ in range(3):
        net = ConvNet(half, 6, half * (1 + affine), activation=nn.ELU)
        coupling = AdditiveCoupling(net)
        if affine:
            coupling = AffineCoupling(net, scale=squashed_sigmoid())
        parts += [shaken(coupling, 0.2), Permutation.reverse(channels)]
    return Chain(*parts)


def freia() -> Chain:
    def net(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inner, 6), nn.Tanh(), nn.Linear(6, outer))

    kinds = (Ff.GLOWCouplingBlock, Ff.AllInOneBlock, Ff.NICECouplingBlock)
    blocks = [shaken(kind([(4,)], subnet_constructor=net), 0.3) for kind in kinds]
    return Chain(*(ig.wrap(block) for block in blocks))


MODELS = {
    "SiLU": (lambda: vectors(nn.SiLU), (4,)),
    "kinks": (lambda: vectors(nn.ReLU), (4,)),
    "images": (images, (1, 6, 6)),
    "additive images": (lambda: images(affine=False), (1, 6, 6)),
    "FrEIA": (freia, (4,)),
}
RADII = (0.0, 1e-8, 1e-4, 1e-2)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", first(1, range(5)))
def test_no_ratio_is_above_and_no_state_outside(name, radius, seed):
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    model = make()
    centre = torch.randn(shape, dtype=torch.float64)
    box = Box(centre - radius, centre + radius)
    maps = [bounded_map(layer.block, layer) for layer in model.layers()]
    found = linearised(maps, box, Deadline())
    assert found or radius == RADII[-1]
    x = sample(box, 40).double()
    state, J = x, torch.eye(centre.numel(), dtype=torch.float64)
    for layer, known in zip(model.layers(), found, strict=False):
        J = jacobians(layer, state) @ J
        with torch.no_grad():
            state = layer(state)
        margin = 1e-9 * (1 + state.abs())
        assert bool(((known.box.lo <= state + margin) & (state - margin <= known.box.hi)).all())
        sigma = torch.linalg.svdvals(J)
        assert float(sigma[:, 0].max()) <= known.bounds.forward * ROUNDING
        assert float((1 / sigma[:, -1]).max()) <= known.bounds.inverse * ROUNDING
        if radius == RADII[1] and name != "kinks":
            assert known.bounds.forward <= 1.01 * float(sigma[:, 0].max())
            assert known.bounds.inverse <= 1.01 * float((1 / sigma[:, -1]).max())


def test_bounds_of_an_image_are_near_what_is_witnessed(monkeypatch):
    torch.manual_seed(0)
    # as for samples of many entries
    monkeypatch.setattr(whole_network, "WIDE", 0)
    model = images()
    centre = torch.randn(1, 6, 6, dtype=torch.float64)
    box = Box(centre - 1e-5, centre + 1e-5)
    effort = SearchBudget(steps=0, width=0)
    bounds = lipschitz_bounds(model, box, data=centre[None], seconds=0.2, effort=effort)
    assert max(bounds.looseness) < 1.05
    assert "linearisation" in bounds.method[0]


def test_widths_grow_and_the_chain_ends_where_nothing_is_known():
    torch.manual_seed(0)
    model = vectors(nn.SiLU)
    maps = [bounded_map(layer.block, layer) for layer in model.layers()]
    narrow, wide = (
        linearised(maps, Box(-r * torch.ones(4), r * torch.ones(4)), Deadline())
        for r in (1e-5, 1e-3)
    )
    assert narrow[-1].bounds.forward < wide[-1].bounds.forward
    assert bool((narrow[-1].box.radius < wide[-1].box.radius).all())
    huge = linearised(maps, Box(-1e3 * torch.ones(4), 1e3 * torch.ones(4)), Deadline())
    assert len(huge) < len(maps)
    assert linearised(maps, Box.everywhere((4,)), Deadline()) == []
    assert linearised(maps, Box(-torch.ones(4), torch.ones(4)), Deadline(-math.inf)) == []
    singular = InvertibleLinear(4).double()
    nn.init.zeros_(singular.weight)
    with pytest.raises(Unbounded):
        LinearisedChain.of(Box(-torch.ones(4), torch.ones(4))).through(
            bounded_map(singular, singular)
        )
