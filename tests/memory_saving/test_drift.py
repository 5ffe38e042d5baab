from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.layers.networks import MLP
from inn_guard.memory_saving import memory_saving
from inn_guard.memory_saving.drift import PROJECTIONS, Guard
from tests.cases.trials import first
from tests.memory_saving import nets
from tests.memory_saving.test_model import assert_close, moments


def relative_error(found, expected):
    a, b = (torch.cat([g.flatten() for g in gradients]).double() for gradients in (found, expected))
    return float((a - b).norm() / b.norm())


def gradients_of(f, x, parameters):
    return torch.autograd.grad(moments(f(x)), parameters)


@pytest.mark.parametrize("dtype", first(1, [torch.float32, torch.float64]))
def test_wrong_gradient_without_true_one_with(dtype):
    model = nets.exploding().to(dtype)
    x, parameters = nets.vectors().to(dtype), list(model.parameters())
    true = gradients_of(model, x, parameters)
    unguarded = relative_error(gradients_of(memory_saving(model), x, parameters), true)
    assert math.isnan(unguarded) or unguarded > 0.1
    guarded = relative_error(gradients_of(memory_saving(model, guard=1e-5), x, parameters), true)
    assert guarded < 1e-4
    log_det = torch.autograd.grad(
        nets.nll(*memory_saving(model, guard=1e-5).forward_and_log_det(x)), parameters
    )
    expected = torch.autograd.grad(nets.nll(*model.forward_and_log_det(x)), parameters)
    assert relative_error(log_det, expected) < 1e-4


class WrongInverse(Invertible):
    """The identity, with an inverse that is off."""

    def __init__(self, error) -> None:
        super().__init__()
        self.error = error
        self.w = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x + 0.1 * torch.tanh(self.w * x)

    def inverse(self, z):
        return self.error(z)


def raises(z):
    raise ArithmeticError("outside its domain")


ERRORS = {
    "nan": lambda z: z * math.nan,
    "inf": lambda z: z + math.inf,
    "one entry of one sample": lambda z: z.index_put(
        (torch.tensor(1), torch.tensor(2)), torch.tensor(9.0)
    ),
    "raises": raises,
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_whatever_goes_wrong_in_an_inverse(error):
    model = Chain(
        nets.flow(1), WrongInverse(error), nets.flow(1), WrongInverse(error), nets.flow(1)
    )
    x, parameters = nets.vectors(), list(model.parameters())
    assert_close(
        gradients_of(memory_saving(model, guard=0.01), x, parameters),
        gradients_of(model, x, parameters),
    )


def test_an_error_of_an_inverse_is_raised_without_a_guard():
    model = Chain(nets.flow(1), WrongInverse(raises))
    with pytest.raises(ArithmeticError):
        memory_saving(model)(nets.vectors()).sum().backward()


def test_true_states_that_are_not_finite_give_the_true_gradient():
    model, x = nets.flow(), nets.vectors()
    x[1, 2] = math.inf
    parameters = list(model.parameters())
    found, expected = (
        gradients_of(f, x, parameters) for f in (memory_saving(model, guard=0.01), model)
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


def counting(model):
    counted = [nets.Counted(layer.network) for layer in model.layers() if hasattr(layer, "network")]
    for layer, network in zip(
        [layer for layer in model.layers() if hasattr(layer, "network")], counted, strict=True
    ):
        layer.network = network
    return counted


def test_a_healthy_net_is_not_evaluated_again_and_a_broken_one_once_more():
    healthy = nets.flow()
    calls = counting(healthy)
    memory_saving(healthy, guard=1e-6)(nets.vectors()).sum().backward()
    assert [network.calls for network in calls] == [2] * len(calls)
    broken = nets.exploding().float()
    calls = counting(broken)
    memory_saving(broken, guard=1e-6)(nets.vectors().float()).sum().backward()
    # forwards, in vain inverted (once a segment), forwards again, with a graph
    assert max(network.calls for network in calls) <= 4
    assert sum(network.calls for network in calls) <= 3.5 * len(calls)


@given(size=st.integers(1, 400), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 10**6))
def test_fingerprints_measure_distances(size, scale, seed):
    """|fingerprint difference|^2 / |difference|^2 is chi^2 with 8 degrees of freedom over 8."""
    generator = torch.Generator().manual_seed(seed)
    x, error = (scale * torch.randn(64, size, generator=generator) for _ in range(2))
    guard = Guard(1.0)
    difference = (guard.fingerprint(x + 0.01 * error) - guard.fingerprint(x))[:, :-1].norm(dim=1)
    ratio = difference / (0.01 * error.norm(dim=1))
    assert float(ratio.min()) > 0.1
    assert float(ratio.max()) < 3.0


def test_fingerprints_are_unbiased():
    error = torch.randn(4000, 500)
    squared = Guard(1.0).fingerprint(error)[:, :-1].square().sum(1) / error.square().sum(1)
    assert abs(float(squared.mean()) - 1) < 0.05  # one matrix for all: its own length shows
    assert abs(float(squared.var()) - 2 / PROJECTIONS) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tolerance_is_relative_per_sample(dtype):
    x = torch.randn(4, 300).to(dtype)
    x[2] *= 100
    guard = Guard(0.05)
    fingerprint = guard.fingerprint(x)
    assert guard.accepts(x, fingerprint)
    assert guard.accepts(1.005 * x, fingerprint)
    assert not guard.accepts(1.5 * x, fingerprint)
    one = x.clone()
    one[0] += x[0].norm() * 0.7 / 300**0.5
    assert not guard.accepts(one, fingerprint)
    assert not guard.accepts(x * math.nan, fingerprint)
    assert guard.accepts(x[:0], fingerprint[:0])


@pytest.mark.thorough
def test_in_float32_nets_the_guard_alarms_where_the_error_is():
    model = Chain(nets.flow(), nets.coupling(network=MLP([3, 8, 6]))).float()
    x, parameters = nets.vectors().float(), list(model.parameters())
    true = gradients_of(model, x, parameters)
    for guard in (None, 1e-4, 1e-9):
        assert (
            relative_error(gradients_of(memory_saving(model, guard=guard), x, parameters), true)
            < 1e-5
        )
