"""Splines of one kept entry on small boxes: thousands of sampled values and derivatives inside their enclosures."""

from __future__ import annotations

import pytest
import torch
from nflows import transforms as nf

import inn_guard as ig
from inn_guard.adapters import bounds_nflows  # noqa: F401 - registers the rules
from inn_guard.layers.networks import MLP
from inn_guard.lipschitz.blocks import Pair
from inn_guard.lipschitz.branch_and_bound import branch_and_bound
from inn_guard.lipschitz.deadline import Deadline
from inn_guard.lipschitz.interval_steps import State, step_of
from inn_guard.lipschitz.intervals import Box, Interval
from inn_guard.lipschitz.maps import bounded_map
from tests.lipschitz.soundness import ROUNDING, jacobians


class Net(MLP):
    def forward(self, x, context=None):
        return super().forward(x)


def coupling(tails: str | None, mask=(0, 1)):
    def make(inner: int, outer: int) -> Net:
        net = Net([inner, 12, 12, outer], activation=torch.nn.SiLU)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.8)
        return net

    kind = nf.PiecewiseRationalQuadraticCouplingTransform
    return ig.wrap(kind(list(mask), make, num_bins=4, tails=tails, tail_bound=2.0))


@pytest.mark.parametrize("width", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("tails", ["linear", None])
@pytest.mark.parametrize("mask", [(0, 1), (0, 1, 1)])
def test_enclosures(width, tails, mask):
    torch.manual_seed(0)
    layer = coupling(tails, mask).double()
    d = len(mask)
    low, high = (-2.5, 2.5) if tails else (0.0, 1.0)
    described = bounded_map(layer.block, layer)
    step = step_of(described, Interval(torch.full((d,), low), torch.full((d,), high)))
    lo = low + (high - low) * torch.rand(1500, d)
    hi = torch.minimum(lo + width, torch.tensor(high))
    eye = Interval.of(torch.eye(d).expand(len(lo), d, d))
    small = Interval(lo, hi)
    end = step(State(Interval.of(small.centre), small, eye, eye))
    for _ in range(4):
        x = lo + (hi - lo) * torch.rand(lo.shape).round(decimals=1)
        J = jacobians(layer, x)
        with torch.no_grad():
            z = layer(x)
        inverse = torch.linalg.inv(J)
        for enclosure, true in ((end.box, z), (end.J, J), (end.K, inverse)):
            margin = 1e-7 * (1 + true.abs().flatten(1).amax(1)).reshape(-1, *[1] * (true.dim() - 1))
            assert bool((enclosure.lo <= true + margin).all())
            assert bool((true - margin <= enclosure.hi).all())
    if width == 1e-4:
        assert float((end.J.radius.flatten(1).amax(1) / (1 + J.abs().flatten(1).amax(1))).median()) < 0.01


def test_two_splines_are_bracketed():
    torch.manual_seed(1)
    layers = [coupling("linear", mask).double() for mask in ((0, 1), (1, 0))]
    box = Box(-torch.ones(2), torch.ones(2))
    x = 2 * torch.rand(20000, 2) - 1
    J = jacobians(layers[0], x)
    with torch.no_grad():
        J = jacobians(layers[1], layers[0](x)) @ J
    sigma = torch.linalg.svdvals(J)
    true = Pair(float(sigma[:, 0].max()), float(1 / sigma[:, -1].min()))
    found = branch_and_bound(
        [bounded_map(layer.block, layer) for layer in layers], box, lower=true, deadline=Deadline.after(12.0)
    )
    for bound, truth in zip(found.pair, true, strict=True):
        assert truth <= bound * ROUNDING
        assert bound <= 1.1 * truth
