"""Splines of one kept entry on small boxes: sampled values and derivatives inside enclosures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from nflows import transforms as nf

import inn_guard as ig
from inn_guard.execution.deadline import Deadline
from inn_guard.layers.networks import MLP
from inn_guard.lipschitz.branch_and_bound.propagation import State, step_of
from inn_guard.lipschitz.branch_and_bound.search import branch_and_bound, form_norm
from inn_guard.lipschitz.maps.base import bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.rules import nflows as bounds_nflows  # noqa: F401 - registers the rules
from inn_guard.lipschitz.transformers.rational_quadratic import RationalQuadraticSpline
from inn_guard.numerics.intervals import Box, Interval
from tests.cases.trials import first
from tests.lipschitz.soundness import ROUNDING, assert_encloses, jacobians


class Net(MLP):
    def forward(self, x, context=None):
        return super().forward(x)


def coupling(tails: str | None, mask=(0, 1), activation=torch.nn.SiLU):
    def make(inner: int, outer: int) -> Net:
        net = Net([inner, 12, 12, outer], activation=activation)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.8)
        return net

    kind = nf.PiecewiseRationalQuadraticCouplingTransform
    return ig.wrap(kind(list(mask), make, num_bins=4, tails=tails, tail_bound=2.0))


@pytest.mark.thorough
@pytest.mark.parametrize("width", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("tails", ["linear", None])
@pytest.mark.parametrize("mask", [(0, 1), (0, 1, 1)])
@pytest.mark.parametrize("activation", [torch.nn.SiLU, torch.nn.ReLU])
def test_enclosures(width, tails, mask, activation):
    torch.manual_seed(0)
    layer = coupling(tails, mask, activation).double()
    d = len(mask)
    low, high = (-2.5, 2.5) if tails else (0.0, 1.0)
    described = bounded_map(layer.block, layer)
    step = step_of(described, Interval(torch.full((d,), low), torch.full((d,), high)))
    lo = low + (high - low) * torch.rand(1500, d)
    hi = torch.minimum(lo + width, torch.tensor(high))
    small = Interval(lo, hi)
    end = step(State.of(small))
    for _ in range(4):
        x = lo + (hi - lo) * torch.rand(lo.shape).round(decimals=1)
        J = jacobians(layer, x)
        with torch.no_grad():
            z = layer(x)
        for form, true in ((end.x, z), (end.J, J), (end.K, torch.linalg.inv(J))):
            margin = 1e-7 * (1 + true.abs().flatten(1).amax(1)).reshape(-1, *[1] * (true.dim() - 1))
            known = form.rest.flatten(1).isfinite().all(1)
            assert_encloses(form[known], small[known], x[known], true[known], margin[known])
    if activation is torch.nn.ReLU:
        return
    finite = float(known.double().mean())
    assert finite > {0.3: -1, 1e-2: 0.85, 1e-4: 0.99}[width]
    if width == 1e-4:
        assert float(end.J.rest.flatten(1).amax(1).median()) < 1e-3


@pytest.mark.parametrize("blocks", first(1, [2, 4]))
def test_splines_are_bracketed(blocks):
    torch.manual_seed(1)
    layers = [coupling("linear", (k % 2, 1 - k % 2)).double() for k in range(blocks)]
    if blocks > 2:
        for layer in layers:
            for parameter in layer.parameters():
                parameter.data.mul_(0.5)
    box = Box(-torch.ones(2), torch.ones(2))

    def at(x: torch.Tensor) -> Pair:
        J = torch.eye(2).expand(len(x), 2, 2)
        for layer in layers:
            J = jacobians(layer, x) @ J
            with torch.no_grad():
                x = layer(x)
        sigma = torch.linalg.svdvals(J)
        return Pair(float(sigma[:, 0].max()), float(1 / sigma[:, -1].min()))

    best = Pair(0.0, 0.0)

    def probe(points: torch.Tensor) -> Pair:
        nonlocal best
        best = Pair(*map(max, best, at(points)))
        return best

    true = at(2 * torch.rand(20000, 2) - 1)
    maps = [bounded_map(layer.block, layer) for layer in layers]
    found = branch_and_bound(
        maps, box, lower=true, probe=probe, deadline=Deadline.after(60.0), tolerance=1.02
    )
    for bound, truth, reached in zip(found.pair, true, best, strict=True):
        assert max(truth, reached) <= bound * ROUNDING
        assert bound <= 1.021 * max(truth, reached)


def test_no_sampled_jacobian_is_above_the_bound_of_its_box():
    torch.manual_seed(2)
    layers = [coupling("linear", (k % 2, 1 - k % 2)).double() for k in range(3)]
    steps = [
        step_of(bounded_map(layer.block, layer), Interval(-3 * torch.ones(2), 3 * torch.ones(2)))
        for layer in layers
    ]
    for width in (0.2, 0.02, 0.002):
        lo = (2.4 - width) * (2 * torch.rand(400, 2) - 1) - width / 2
        state = State.of(Interval(lo, lo + width))
        for step in steps:
            state = step(state)
        bounds = form_norm(state.J), form_norm(state.K)
        for _ in range(5):
            x, J = lo + width * torch.rand(lo.shape), torch.eye(2).expand(len(lo), 2, 2)
            for layer in layers:
                J = jacobians(layer, x) @ J
                with torch.no_grad():
                    x = layer(x)
            sigma = torch.linalg.svdvals(J)
            assert bool((sigma[:, 0] <= bounds[0] * ROUNDING).all())
            assert bool((1 / sigma[:, 1] <= bounds[1] * (1 + 1e-6)).all())
    assert float((bounds[0] / sigma[:, 0]).median()) < 1.1


def test_a_spline_with_other_knots_is_not_taken_for_this_one():
    @dataclass(frozen=True)
    class Doubled(RationalQuadraticSpline):
        def derivative(self, raw: Interval) -> Interval:
            return super().derivative(raw) * 2.0

        def derivative_rate(self, raw: Interval) -> Interval:
            return super().derivative_rate(raw) * 2.0

    torch.manual_seed(3)
    layer = coupling("linear").double()
    described = bounded_map(layer.block, layer)
    other = replace(described, transformer=Doubled(**vars(described.transformer)))
    reach, points = Interval(-torch.ones(2), torch.ones(2)), 2 * torch.rand(50, 2) - 1
    images = [
        step_of(m, reach)(State.of(Interval(points, points))).x.range[:, 1]
        for m in (described, other)
    ]
    theta = [
        layer.block.transform_net(points[:, :1])[:, k].detach()
        for k in range(other.transformer.count)
    ]
    thin = other.transformer.value(Interval.of(points[:, 1]), [Interval.of(t) for t in theta])
    assert bool((images[1].lo <= thin.hi).all() and (thin.lo <= images[1].hi).all())
    assert bool(((images[0].lo > thin.hi) | (images[0].hi < thin.lo)).any())
