"""Inverse and gradient of a coupling share one evaluation of its network, in any library."""

from __future__ import annotations

import torch
from torch import nn

from inn_guard.layers.networks import MLP
from inn_guard.memory_saving import memory_saving
from tests.memory_saving import nets
from tests.memory_saving.test_model import assert_close, gradients


def wrapped_nflows(network):
    from nflows.distributions.normal import ConditionalDiagonalNormal
    from nflows.flows.base import Flow
    from nflows.transforms import (
        AffineCouplingTransform,
        CompositeTransform,
        InverseTransform,
        PiecewiseRationalQuadraticCouplingTransform,
        ReversePermutation,
    )

    from inn_guard.adapters import wrap

    mask = torch.tensor([0, 1, 0, 1, 0, 1])
    spline = PiecewiseRationalQuadraticCouplingTransform(
        mask, network, num_bins=4, tails="linear", tail_bound=3.0
    )
    couplings = [AffineCouplingTransform(mask, network), ReversePermutation(nets.FEATURES), spline]
    transform = CompositeTransform(
        [*couplings, InverseTransform(AffineCouplingTransform(mask, network))]
    )
    base = ConditionalDiagonalNormal([nets.FEATURES], nn.Linear(2, 2 * nets.FEATURES))
    flow = Flow(transform, base, embedding_net=nn.Linear(3, 2)).double()
    return flow, wrap(flow, context=torch.randn(nets.BATCH, 3))


def test_couplings_of_nflows_are_fused_and_the_base_is_the_flows_own():
    networks = []

    class Network(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.counted = nets.Counted(MLP([inputs + 2, 8, outputs]))
            networks.append(self.counted)

        def forward(self, x, context):
            return self.counted(torch.cat([x, context], dim=1))

    flow, model = wrapped_nflows(Network)
    x, parameters = nets.vectors(), list(flow.parameters())
    value = memory_saving(model).log_prob(x).mean()
    assert [network.calls for network in networks] == [1, 1, 1]
    found = gradients(value, parameters)
    assert [network.calls for network in networks] == [2, 2, 2]
    expected = flow.log_prob(x, model.context).mean()
    assert torch.allclose(value, expected, rtol=1e-12)
    assert_close(found, gradients(expected, parameters))
    assert all(gradient is not None for gradient in found)


def test_layers_of_a_multiscale_net_are_fused():
    model = nets.multiscale()
    counted = []
    for layer in model.layers():
        layer = getattr(layer, "layer", layer)
        if hasattr(layer, "network"):
            layer.network = nets.Counted(layer.network)
            counted.append(layer.network)
    memory_saving(model)(nets.images()).sum().backward()
    assert [network.calls for network in counted] == [2] * len(counted)
