"""Enclosures of activations against dense sampling and finite differences."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from inn_guard.lipschitz.networks.activations import FUNCTIONS, activation
from inn_guard.numerics.intervals import Interval

MODULES = [
    nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.5), nn.ELU(), nn.ELU(2.0), nn.ELU(0.5), nn.SELU(),
    nn.SiLU(), nn.GELU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.Softplus(3.0), nn.Hardtanh(),
    nn.ReLU6(), nn.CELU(), nn.CELU(0.5), nn.CELU(2.0),
    nn.LogSigmoid(), nn.Identity(),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=repr)
@given(lo=st.floats(-8, 8), width=st.floats(0, 6))
def test_values_and_slopes_lie_inside(module, lo, width):
    points = torch.linspace(lo, lo + width, 101, dtype=torch.float64).requires_grad_()
    box = Interval(points[:1].detach(), points[-1:].detach())
    known = activation(module)
    values = module(points)
    (slopes,) = torch.autograd.grad(values.sum(), points)
    for enclosure, true in ((known.value(box), values), (known.slope(box), slopes)):
        assert (enclosure.lo <= true).all()
        assert (true <= enclosure.hi).all()


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_enclosures_are_tight_and_limits_hold(module):
    known = activation(module)
    low, high = known.slopes()
    points = torch.linspace(-30, 30, 120001, dtype=torch.float64).requires_grad_()
    (slopes,) = torch.autograd.grad(module(points).sum(), points)
    assert low <= slopes.min() <= low + 1e-5
    assert high - 1e-5 <= slopes.max() <= high
    half_lines = Interval(
        torch.tensor([-math.inf, 1e4]).double(), torch.tensor([-1e4, math.inf]).double()
    )
    far = module(torch.tensor([-1e5, 1e5]).double())
    value = known.value(half_lines)
    assert (value.lo <= far).all()
    assert (far <= value.hi).all()
    if 0 < known.curvature < math.inf:
        (curves,) = torch.autograd.grad(known.derivative(points).sum(), points)
        assert curves.abs().max() <= known.curvature + 1e-9


def test_functions_are_their_modules():
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    for function, module in FUNCTIONS.items():
        assert torch.equal(function(x), module(x))


def test_unknown_modules_are_not_activations():
    assert activation(nn.Softmax(0)) is None
    assert activation(nn.GELU("tanh")) is None


@given(
    factors=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=63), sign=st.sampled_from([-1, 1])
)
def test_what_roundings_lose_lies_around_a_computed_number(factors, sign):
    computed, true = float(sign), Fraction(sign)
    for factor in factors:
        computed, true = computed * factor, true * Fraction(factor)
    around = Interval.around(torch.tensor(computed, dtype=torch.float64))
    assert Fraction(float(around.lo)) < true < Fraction(float(around.hi))
    assert around.hi - around.lo <= 2.0**-45 * abs(computed)


def test_around_what_is_no_number_is_everything():
    around = Interval.around(torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64))
    assert around.lo.tolist()[0::2] == [-math.inf] * 2
    assert around.hi.tolist()[:2] == [math.inf] * 2
    for k, value in enumerate((0.0, math.inf, -math.inf)):
        assert around.lo[k] <= value <= around.hi[k]
