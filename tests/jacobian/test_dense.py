"""SequentialJacobian Jacobians against autograd, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.dense import composed_jacobian
from inn_guard.jacobian.network import AutogradNetwork, linearize_network
from inn_guard.jacobian.network_dense import add_product_, dense_network
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from tests.cases.layers import CASES
from tests.oracles import transforms as reference

KERNELS = {
    "glow": [
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 6, 1),
        nn.ELU(),
        nn.Conv2d(6, 3, 3, padding=1),
    ],
    "one": [nn.Conv2d(2, 3, 3, padding=1)],
    "pointwise first": [nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)],
    "slope first": [nn.Tanh(), nn.Conv2d(2, 3, 5, padding=2), nn.Identity(), nn.ReLU()],
    "uneven": [
        nn.Conv2d(2, 3, (1, 3), padding=(0, 1)),
        nn.ELU(),
        nn.Conv2d(3, 2, (5, 3), padding=(2, 1)),
    ],
    "three wide": [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ELU(),
        *(nn.Conv2d(3, 3, 5, padding=2), nn.Conv2d(3, 2, 3, padding=1)),
    ],
    "stride": [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU()],
    "valid": [nn.Conv2d(2, 3, 3), nn.ReLU()],
    "dilated": [nn.Conv2d(2, 3, 3, dilation=2, padding=2)],
    "nothing": [],
    "identity": [nn.Identity()],
    "flat": [nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(60, 7)],
}


def dense_by_columns(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    slow = AutogradNetwork(network, x)
    eye = torch.eye(x.numel()).reshape(-1, *x.shape)
    return torch.stack([slow.jvp(column).flatten() for column in eye], dim=1)


@pytest.mark.parametrize("name", KERNELS)
def test_dense_network_of_images(name):
    network, x = nn.Sequential(*KERNELS[name]).double(), torch.randn(1, 2, 4, 5)
    J = dense_network(linearize_network(network, x), x.shape[1:])
    expected = dense_by_columns(network, x)
    assert (J - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("name", KERNELS)
def test_a_gain_combines_the_two_halves_of_the_output(name):
    x = torch.randn(1, 2, 4, 5)
    network = nn.Sequential(*KERNELS[name]).double()
    shape = network(x).shape
    doubled = nn.Linear(shape[1], 6) if len(shape) == 2 else nn.Conv2d(shape[1], 6, 3, padding=1)
    network.append(doubled.double())
    tangent = linearize_network(network, x)
    gain = torch.randn_like(tangent.output.chunk(2, 1)[0])
    shift, h = dense_by_columns(network, x).chunk(2)
    expected = shift + gain.reshape(-1, 1) * h
    assert (
        dense_network(tangent, x.shape[1:], gain=gain) - expected
    ).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("name", sorted(set(KERNELS) - {"flat"}))
@pytest.mark.parametrize("with_gain", [False, True])
def test_a_product_is_added_without_the_dense_jacobian(name, with_gain):
    x = torch.randn(1, 2, 9, 5)
    network = nn.Sequential(*KERNELS[name]).double()
    if with_gain:
        network.append(nn.Conv2d(network(x).shape[1], 6, 3, padding=1).double())
    tangent = linearize_network(network, x)
    gain = torch.randn_like(tangent.output.chunk(2, 1)[0]) if with_gain else None
    J = dense_network(tangent, x.shape[1:], gain=gain)
    matrix, start = torch.randn(x.numel(), 4), torch.randn(len(J), 4)
    target = start.clone()
    add_product_(target, tangent, matrix, shape=x.shape[1:], gain=gain)
    assert (target - start - J @ matrix).norm() <= 1e-12 * J.norm() * matrix.norm()


def test_dense_network_of_vectors():
    network, x = MLP([4, 7, 6, 3], activation=nn.SiLU), torch.randn(1, 4)
    J = dense_network(linearize_network(network, x), (4,))
    assert torch.allclose(J, dense_by_columns(network, x), atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_composed_jacobian_equals_autograd(case):
    model, x = case.make()
    J, expected = composed_jacobian(model, x), reference.jacobian(model.forward, x)
    assert J.shape == expected.shape
    assert (J - expected).norm() <= 1e-11 * expected.norm()


def test_the_model_and_x_are_left_alone():
    model: Invertible = Chain(AffineCoupling.on_halves(4, lambda kept, out: MLP([kept, 8, out])))
    x = torch.randn(2, 4)
    before = x.clone()
    composed_jacobian(model, x)
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="at least one sample"):
        composed_jacobian(model, x[:0])
