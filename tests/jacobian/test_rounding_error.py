"""The forecast against its dense twin, closed forms and what is measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.rounding_error import rounding_forecast, unit_roundoff
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation


class Diagonal(Invertible):
    """z = d x."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.as_tensor(factor))

    def forward(self, x):
        return x * self.factor

    def inverse(self, z):
        return z / self.factor


def generator():
    return torch.Generator().manual_seed(0)


def forecast(model, x, probes=4):
    return rounding_forecast(Linearization(model, x), probes=probes, generator=generator())


def precise_forecast(model, x, copies=4000):
    """The error for a unit roundoff of 1; each sample is repeated to make sampling errors small."""
    errors = forecast(model, x.repeat_interleave(copies, dim=0)).error(1.0)
    return errors.square().reshape(len(x), copies).mean(1).sqrt()


def couplings(dim, depth, gain, seed=0):
    torch.manual_seed(seed)
    layers = []
    for _ in range(depth):
        network = MLP([dim - dim // 2, 32, 2 * (dim // 2)])
        with torch.no_grad():
            network[-1].weight.mul_(gain)
        layers += [AffineCoupling(network), Permutation(torch.randperm(dim))]
    return Chain(*layers)


def dense_forecast(model, x):
    """sqrt(sum_i m_i |A_i diag(h_i)|_F^2 / 3) from dense Jacobians of every partial inverse."""
    states = Linearization(model, x).states
    layers = model.layers()
    total = torch.zeros(len(x))
    for i, state in enumerate(states):

        def back(h, i=i):
            for layer in reversed(layers[:i]):
                h = layer.inverse(h)
            return h

        count = torch.zeros_like(state)
        if i > 0:
            count += rounded(states[i - 1], state)
        if i < len(layers):
            count += rounded(state, states[i + 1])
        for b in range(len(x)):
            a = torch.autograd.functional.jacobian(lambda h: back(h[None])[0], state[b])
            total[b] += ((a * state[b]).square() * count[b]).sum() / 3
    return total.sqrt()


def rounded(before, after):
    if all(sorted(p) == sorted(q) for p, q in zip(before.tolist(), after.tolist(), strict=True)):
        return torch.zeros_like(after)
    return (before != after).to(after)


def test_agrees_with_the_dense_twin():
    model, x = couplings(5, 6, gain=3.0), torch.randn(4, 5)
    expected = dense_forecast(model, x)
    got = precise_forecast(model, x)
    assert torch.allclose(got, expected, rtol=0.05)


def test_one_diagonal_layer_in_closed_form():
    """z = d x rounds z and x once each, by U(-u |x|, u |x|): a variance of 2 u^2 x^2 / 3."""
    x = torch.tensor([[3.0, -4.0]])
    got = precise_forecast(Diagonal([7.0, 0.1]), x) * unit_roundoff(torch.float32)
    assert got.item() == pytest.approx(2.0**-24 * math.sqrt(2 * 25 / 3), rel=0.02)


def test_an_error_made_before_a_contraction_is_amplified_by_its_inverse():
    x = torch.ones(1, 1)
    plain = precise_forecast(Chain(Diagonal([1e-6]), AdditiveCouplingOfOne()), x).item()
    assert plain == pytest.approx(math.sqrt((2 + 1e12 + 1) / 3), rel=0.05)


class AdditiveCouplingOfOne(Invertible):
    """z = x + 1 after a layer that maps 1 to 1e-6: rounding of z = 1 is a million times larger."""

    def forward(self, x):
        return x + 1

    def inverse(self, z):
        return z - 1


def test_copies_are_not_rounded():
    x = torch.randn(3, 6)
    got = forecast(Chain(Permutation(torch.randperm(6)), Permutation(torch.randperm(6))), x)
    assert torch.equal(got.error(1.0), torch.zeros(3))


def test_deep_contractions_leave_the_range_of_floats_and_come_out_as_logarithms():
    got = forecast(
        Chain(*[Chain(Diagonal([1e-30]), AdditiveCouplingOfOne()) for _ in range(20)]),
        torch.ones(1, 1),
    )
    assert got.log_error.item() == pytest.approx(20 * 30 * math.log(10), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "depth", "gain"), [(8, 8, 1.0), (8, 16, 2.0), (32, 16, 1.5)])
def test_the_measured_error_is_of_the_size_of_the_forecast(dtype, dim, depth, gain):
    model = couplings(dim, depth, gain).to(torch.float32)
    x = torch.randn(256, dim, dtype=torch.float32)
    expected = forecast(model, x).error(unit_roundoff(dtype))
    twin, cast = model.to_dtype(dtype), x.to(dtype)
    with torch.no_grad():
        measured = (twin.inverse(twin(cast)).double() - cast.double()).norm(dim=1)
    first_order = expected < 0.1 * x.norm(dim=1)
    assert first_order.sum() >= 30
    assert 0.5 <= (measured / expected)[first_order].median().item() <= 2


def test_an_additive_coupling_copies_half_of_its_input():
    torch.manual_seed(0)
    layer = AdditiveCoupling(MLP([2, 8, 2]))
    x = torch.randn(5, 4)
    got = precise_forecast(Chain(layer), x)
    z = layer(x)
    changed = (x != z).to(x)
    assert changed.sum(1).eq(2).all()
    expected = (((x * changed).square().sum(1) + (z * changed).square().sum(1)) / 3).sqrt()
    assert torch.allclose(got, expected, rtol=0.02)
