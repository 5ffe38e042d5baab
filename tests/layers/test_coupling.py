"""Couplings beyond the contract: one network evaluation serves all, contexts, partitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.networks import MLP, Conditional, ConvNet, zero_last
from inn_guard.layers.partition import Halves, Mask
from inn_guard.layers.scales import squashed_sigmoid


class Counted(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x):
        self.calls += 1
        return self.network(x)


@pytest.mark.parametrize("kind", [AdditiveCoupling, AffineCoupling])
def test_one_network_evaluation_inverts(kind):
    layer = kind.on_halves(5, lambda kept, out: Counted(MLP([kept, 8, out])))
    x = torch.randn(3, 5)
    z, log_det = layer.forward_and_log_det(x)
    kept, changed = layer.split(z)
    elementwise = layer.parameters_of(kept)
    assert layer.network.calls == 2
    assert torch.allclose(layer.join(kept, elementwise.inverse(changed)), x, atol=1e-14)
    assert torch.allclose(elementwise.log_det(), log_det, atol=1e-14)


def test_affine_is_shift_then_scale_by_hand():
    network = nn.Linear(1, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[2.0], [0.0]]))
        network.bias.copy_(torch.tensor([0.5, 1.0]))
    z = AffineCoupling(network)(torch.tensor([[3.0, 4.0]]))
    assert torch.allclose(z, torch.tensor([[3.0, 4.0 * torch.sigmoid(torch.tensor(3.0)) + 6.5]]))


def test_jacobian_of_the_kept_part_is_the_identity():
    layer = AffineCoupling.on_halves(
        6, lambda kept, out: MLP([kept, 8, out]), swapped=True, scale=squashed_sigmoid()
    )
    J = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], torch.randn(6))
    assert torch.equal(J[3:], torch.eye(6)[3:])
    assert bool(((J.diagonal()[:3] > 0.5) & (J.diagonal()[:3] < 1)).all())


def test_a_mask_of_halves_is_the_halves():
    network = MLP([3, 8, 6])
    halves = AffineCoupling(network)
    embed, spread = torch.eye(6)[:, :3], torch.zeros(12, 6)
    spread[3:6, :3], spread[9:12, 3:] = torch.eye(3), torch.eye(3)

    class Embedded(nn.Module):
        def forward(self, x):
            return network(x @ embed) @ spread.T

    masked = AffineCoupling(Embedded(), partition=Mask(torch.arange(6) < 3))
    x = torch.randn(4, 6)
    for whole, part in zip(
        masked.forward_and_log_det(x), halves.forward_and_log_det(x), strict=True
    ):
        assert torch.allclose(whole, part, atol=1e-14)


def test_context_reaches_the_network_and_images_get_it_everywhere():
    layer = AffineCoupling(Conditional(ConvNet(2 + 3, 8, 4)))
    x, one, other = torch.randn(2, 4, 4, 4), torch.randn(2, 3), torch.randn(2, 3)
    there, elsewhere = layer.with_context(one), layer.with_context(other)
    assert not torch.allclose(there(x), elsewhere(x))
    assert torch.allclose(there.inverse(there(x)), x, atol=1e-12)
    assert torch.allclose(there.select(torch.tensor([1]))(x[1:]), there(x)[1:], atol=1e-13)


def test_zero_last_starts_affine_couplings_as_a_constant_scale():
    layer = AffineCoupling.on_halves(4, lambda kept, out: zero_last(MLP([kept, 8, out])))
    x = torch.randn(3, 4)
    z = layer(x)
    assert torch.equal(z[:, :2], x[:, :2])
    assert torch.allclose(z[:, 2:], x[:, 2:] * torch.sigmoid(torch.tensor(2.0)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="twice the transformed channels"):
        AffineCoupling(MLP([2, 4, 3]))(torch.randn(1, 4))
    with pytest.raises(TypeError, match="boolean mask"):
        Mask(torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="expected a network"):
        zero_last(nn.ReLU())


@pytest.mark.unchecked
def test_what_is_no_scale_function_is_refused():
    with pytest.raises(TypeError, match="scale function such as SigmoidScale"):
        AffineCoupling(MLP([2, 4, 4]), scale="sigmoid")


def test_uneven_halves():
    x = torch.arange(5.0)[None]
    identity, transformed = Halves().split(x, dims=2)
    assert (identity.shape[1], transformed.shape[1]) == Halves().sizes(5) == (3, 2)
    swapped = Halves(swapped=True)
    assert torch.equal(swapped.join(*swapped.split(x, dims=2), dims=2), x)
    assert swapped.sizes(5) == (2, 3)
