"""Layers of other libraries whose structure is known are multiplied by it, not by autograd."""

from __future__ import annotations

import functools

import nflows.nn.nets
import nflows.transforms as nf
import normflows
import pytest
import torch
import zuko

import inn_guard as ig
from inn_guard.adapters.structured_jacobians import ChainJacobian, EntrywiseJacobian
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.factored import Factored, factored
from inn_guard.layers.coupling import CouplingJacobian
from inn_guard.layers.inverted import InverseJacobian

FEATURES = 5
MASK = torch.arange(FEATURES) % 2
network = functools.partial(nflows.nn.nets.ResidualNet, hidden_features=8, num_blocks=1)
SPLINE = {"tails": "linear", "tail_bound": 3.0}

LAYERS = {
    "nflows spline coupling": (
        lambda: nf.PiecewiseRationalQuadraticCouplingTransform(MASK, network, **SPLINE),
        CouplingJacobian,
    ),
    "nflows spline coupling, identity part through splines": (
        lambda: nf.PiecewiseRationalQuadraticCouplingTransform(
            MASK, network, apply_unconditional_transform=True, **SPLINE
        ),
        ChainJacobian,
    ),
    "nflows MAF": (
        lambda: nf.MaskedAffineAutoregressiveTransform(FEATURES, 8),
        EntrywiseJacobian,
    ),
    "nflows spline MAF": (
        lambda: nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(FEATURES, 8, **SPLINE),
        EntrywiseJacobian,
    ),
    "normflows spline coupling": (
        lambda: normflows.flows.CoupledRationalQuadraticSpline(FEATURES, 1, 8),
        ChainJacobian,
    ),
    "normflows MAF": (
        lambda: normflows.flows.MaskedAffineAutoregressive(FEATURES, 8),
        InverseJacobian,
    ),
    "zuko spline MAF": (
        lambda: zuko.flows.NSF(FEATURES, transforms=1, hidden_features=(8,)),
        EntrywiseJacobian,
    ),
    "zuko spline MAF of two passes": (
        lambda: zuko.flows.NSF(FEATURES, transforms=1, hidden_features=(8,), passes=2),
        EntrywiseJacobian,
    ),
    "zuko RealNVP": (
        lambda: zuko.flows.RealNVP(FEATURES, transforms=1, hidden_features=(8,)),
        CouplingJacobian,
    ),
}


@pytest.fixture(params=LAYERS)
def line(request):
    torch.manual_seed(0)
    make, kind = LAYERS[request.param]
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(4, FEATURES)
    found = Linearization(ig.wrap(layer.eval()), x)
    assert isinstance(found.jacobians[0], kind)
    return found


def test_products_are_those_of_autograd(line):
    x = line.states[0]
    full = torch.autograd.functional.jacobian(lambda v: line.layers[0](v), x)
    J = full[torch.arange(4), :, torch.arange(4)]
    v = torch.randn(4, FEATURES)
    for product, matrix in (
        (line.jvp, J),
        (line.vjp, J.mT),
        (line.inverse_jvp, torch.linalg.inv(J)),
        (line.inverse_vjp, torch.linalg.inv(J).mT),
    ):
        torch.testing.assert_close(product(v).value(), torch.einsum("bij,bj->bi", matrix, v))


def test_selected_samples_keep_their_products(line):
    rows, v = torch.tensor([3, 1]), torch.randn(4, FEATURES)
    line.inverse_jvp(v)  # a factorisation of all samples is selected from
    part = line.select(rows)
    for name in ("jvp", "vjp", "inverse_jvp", "inverse_vjp"):
        few, many = getattr(part, name)(v[rows]).value(), getattr(line, name)(v).value()
        torch.testing.assert_close(few, many[rows])


def test_a_long_inverse_is_factorised_and_a_short_one_substituted():
    def jacobian(passes):
        torch.manual_seed(0)
        flow = zuko.flows.MAF(FEATURES, transforms=1, hidden_features=(8,), passes=passes)
        (found,) = Linearization(ig.wrap(flow.eval()), torch.randn(3, FEATURES)).jacobians
        return found

    long, short = jacobian(None), jacobian(2)
    u = torch.randn(3, FEATURES)
    for one in (long, short):
        torch.testing.assert_close(one.inverse_jvp(one.jvp(u)), u)
        assert isinstance(factored(one), Factored)
        torch.testing.assert_close(factored(one).run(u), one.inverse_jvp(u))
    assert "_factored" in vars(long)
    assert "_factored" not in vars(short)
