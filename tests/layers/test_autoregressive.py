"""Autoregressive layers: dependences, Jacobians, inverses, and nflows as a second opinion."""

from __future__ import annotations

import math

import pytest
import torch
from nflows.transforms import MaskedAffineAutoregressiveTransform

import inn_guard as ig
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.jacobian.network import AutogradNetwork, linearize_network
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.autoregressive import (
    MADE,
    AutoregressiveJacobian,
    MaskedAutoregressive,
    iaf,
    maf,
)
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.reshape import ZeroPadding
from inn_guard.layers.scales import ExpScale, SoftplusScale
from inn_guard.lipschitz import rules
from inn_guard.numerics.intervals import Box
from tests.cases.aef import CASES
from tests.cases.case import randomize
from tests.lipschitz.soundness import assert_sound
from tests.oracles import transforms as reference

LAYERS = [case for case in CASES if "autoregressive" in case.id]
PRODUCTS = ["jvp", "vjp", "inverse_jvp", "inverse_vjp"]


def random_made(features, **settings):
    network = MADE(features, **{"hidden": 20, **settings})
    randomize(network, 0.5)
    return network


def layer(features=5, **settings):
    return MaskedAutoregressive(random_made(features), **settings)


@pytest.mark.parametrize("features", [1, 2, 5, 25])
@pytest.mark.parametrize("blocks", [0, 2])
def test_outputs_depend_on_all_earlier_inputs_and_on_no_other(features, blocks):
    network = random_made(features, blocks=blocks, outputs=3, hidden=64)
    x = torch.randn(40, features)
    touched = reference.jacobian(network, x).abs().amax(0).reshape(3, features, features) > 0
    assert torch.equal(touched, torch.ones(features, features).tril(-1).bool().expand(3, -1, -1))


def test_jacobian_is_lower_triangular_with_the_scales_on_its_diagonal():
    flow, x = layer(), torch.randn(6, 5)
    J = reference.jacobian(flow, x)
    assert float(J.triu(1).abs().max()) == 0
    scales = flow.scale.value(flow.network(x).chunk(2, dim=1)[1])
    assert torch.allclose(J.diagonal(dim1=1, dim2=2), scales, rtol=1e-13)


def test_a_reversal_between_two_layers_fills_the_jacobian():
    flow = maf(4, layers=2, hidden=16)
    randomize(flow, 0.5)
    J = reference.jacobian(flow.eval(), torch.randn(20, 4))
    assert bool((J.abs().amax(0) > 0).all())


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_equal_autograd(case, product):
    flow, x = case.make()
    fast, slow = flow.linearize(x), AutogradJacobian(flow.forward, flow.inverse, x)
    assert torch.allclose(fast.output, slow.output, rtol=1e-12, atol=1e-13)
    vector = torch.randn_like(x)
    actual, expected = getattr(fast, product)(vector), getattr(slow, product)(vector)
    assert actual.shape == expected.shape
    assert not actual.requires_grad
    assert (actual - expected).norm() <= 1e-11 * expected.norm()


def test_the_masked_network_is_differentiated_without_a_graph_and_rightly():
    network, x = random_made(6), torch.randn(3, 6)
    fast, slow = linearize_network(network, x), AutogradNetwork(network, x)
    assert not any(isinstance(step, AutogradNetwork) for step in fast.steps)
    v, u = torch.randn(2, 3, 6), torch.randn(2, 3, 12)
    assert torch.allclose(fast.output, slow.output, rtol=1e-13)
    assert torch.allclose(fast.jvp(v), slow.jvp(v), rtol=1e-11, atol=1e-12)
    assert torch.allclose(fast.vjp(u), slow.vjp(u), rtol=1e-11, atol=1e-12)


def test_jacobians_take_a_leading_dimension():
    flow, x = layer(), torch.randn(4, 5)
    jacobian = flow.linearize(x)
    assert isinstance(jacobian, AutoregressiveJacobian)
    many = torch.randn(3, 4, 5)
    for product in PRODUCTS:
        together = getattr(jacobian, product)(many)
        for row, vector in zip(together, many, strict=True):
            assert torch.allclose(row, getattr(jacobian, product)(vector), rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_round_trip_both_ways(dtype):
    flow, x = layer(12).to(dtype), torch.randn(8, 12, dtype=dtype)
    z = flow(x)
    J = reference.jacobian(flow.double(), x.double())
    sigma = reference.singular_values(J)
    flow = flow.to(dtype)
    allowed = 50 * torch.finfo(dtype).eps * (x.norm() + z.norm() / sigma[:, -1].min()).item()
    assert (flow.inverse(z) - x).norm().item() <= allowed


def test_the_inverse_is_exact_after_as_many_passes_as_features_and_not_before():
    """Each pass makes one more entry right: this is what the D passes are for."""
    flow, x = layer(4), torch.randn(3, 4)
    z = flow(x).detach()
    guess = torch.zeros_like(z)
    for k in range(4):
        shift, h = flow.network(guess).chunk(2, dim=1)
        guess = (z - shift) / flow.scale.value(h)
        right = (guess - x).abs().amax(0) < 1e-12
        assert bool(right[: k + 1].all())
        assert not bool(right[k + 1 :].any())
    assert torch.allclose(flow.inverse(z), guess, rtol=1e-12)


def test_nflows_with_the_same_weights_is_the_same_map():
    theirs = MaskedAffineAutoregressiveTransform(5, hidden_features=20, num_blocks=2).double()
    ours = MaskedAutoregressive(random_made(5), scale=SoftplusScale(1e-3))
    made = theirs.autoregressive_net
    plain = [
        made.initial_layer,
        *(linear for block in made.blocks for linear in block.linear_layers),
        made.final_layer,
    ]
    masked = [module for module in ours.network.modules() if isinstance(module, torch.nn.Linear)]
    for there, here in zip(plain[:-1], masked[:-1], strict=True):
        assert torch.equal(there.mask.bool(), here.parametrizations.weight[0].mask)
        there.weight.data, there.bias.data = (
            here.weight.detach().clone(),
            here.bias.detach().clone(),
        )
    # theirs puts (s, t) of one feature side by side, ours puts t before s
    last = masked[-1]
    order = torch.stack([torch.arange(5) + 5, torch.arange(5)], dim=1).flatten()
    made.final_layer.weight.data, made.final_layer.bias.data = (
        last.weight[order].detach(),
        last.bias[order].detach(),
    )
    x = torch.randn(7, 5)
    wrapped = ig.wrap(theirs)
    for mine, other in zip(
        ours.forward_and_log_det(x), wrapped.forward_and_log_det(x), strict=True
    ):
        assert torch.allclose(mine, other, rtol=1e-12)
    for mine, other in zip(
        ours.inverse_and_log_det(x), wrapped.inverse_and_log_det(x), strict=True
    ):
        assert torch.allclose(mine, other, rtol=1e-10)


def test_a_linear_network_gives_the_gaussian_that_its_triangle_says():
    """t = L x, g = const: x ~ N(0, (T^T T)^-1) with T = L + g I."""
    flow = MaskedAutoregressive(random_made(4, blocks=0), scale=ExpScale())
    with torch.no_grad():
        last = flow.network[1]
        last.weight = last.weight * (torch.arange(8) < 4)[:, None]
    x = torch.randn(6, 4)
    J = reference.jacobian(flow, x)
    assert torch.allclose(J, J[:1].expand_as(J))
    shift = flow(torch.zeros(1, 4))[0]
    mean = -torch.linalg.solve(J[0], shift)
    density = torch.distributions.MultivariateNormal(mean, precision_matrix=J[0].T @ J[0])
    assert torch.allclose(flow.log_prob(x), density.log_prob(x), rtol=1e-10)


def test_iaf_is_the_inverse_of_maf_and_fast_towards_data():
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    flow = iaf(6, layers=1, hidden=16)
    randomize(flow, 0.3)
    flow.inner.steps[0].network.register_forward_hook(count)
    z = torch.randn(3, 6)
    x, log_det = flow.inverse_and_log_det(z)
    assert passes == 1
    again, backward = flow.forward_and_log_det(x)
    assert passes == 7
    assert torch.allclose(again, z, rtol=1e-10)
    assert torch.allclose(log_det, -backward, rtol=1e-10)


def test_maf_has_actnorm_between_its_layers_and_starts_near_a_diagonal():
    flow = maf(5, layers=3, hidden=16)
    kinds = [type(step).__name__ for step in flow.steps]
    assert kinds == [
        "MaskedAutoregressive",
        *["ActNorm", "Permutation", "MaskedAutoregressive"] * 2,
    ]
    J = reference.jacobian(flow.eval(), torch.randn(3, 5))
    # two reversals: the diagonal; softplus(0) + 0.001 per layer
    expected = (math.log(2) + 1e-3) ** 3 * torch.eye(5)
    assert torch.allclose(J, expected.expand_as(J), atol=0.01)


@pytest.mark.parametrize(
    "name", ["masked autoregressive", "masked autoregressive exp", "inverted linear"]
)
def test_certified_bounds_hold_over_sampled_jacobians(name):
    (make,) = [case.make for case in CASES if case.id == f"aef/{name}"]
    flow, x = make()
    rules.load()
    bounds = assert_sound(flow, Box(x.amin(0), x.amax(0)))
    assert bounds.forward < 20
    assert bounds.inverse < 1000


def test_contexts_reach_the_inner_layer():
    inner = ActNorm(3)
    assert InverseLayer(inner).with_context(torch.zeros(2, 1)).inner.context is not None


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="bijective"):
        InverseLayer(ZeroPadding(1))
    with pytest.raises(ValueError, match="positive sizes"):
        MADE(0, hidden=4)
