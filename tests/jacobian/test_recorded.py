from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import inn_guard as ig
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.network import AutogradNetwork
from inn_guard.jacobian.recorded import (
    RecordedJacobian,
    RecordedNetwork,
    linearize_function,
    recorded_jacobian,
)


def data(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def network(kept, out):
    return nn.Sequential(nn.Linear(kept, 7), nn.SiLU(), nn.LayerNorm(7), nn.Linear(7, out))


class Blocks(nn.Module):
    """Couplings, permutations, scales and matrices of a user's own; nothing says which."""

    def __init__(self, write_in_place=False):
        super().__init__()
        self.nets = nn.ModuleList([network(3, 6), network(3, 6)])
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.matrix = nn.Parameter(torch.eye(6) + 0.1 * torch.randn(6, 6))
        self.register_buffer("order", torch.randperm(6))
        self.write_in_place = write_in_place
        self.eval()

    def encode(self, x):
        for net in self.nets:
            x = ((x * self.scale - 0.3) @ self.matrix.t())[:, self.order]
            first, second = x.chunk(2, dim=1)
            shift, scale = net(first).chunk(2, dim=1)
            second = (second + shift) * torch.sigmoid(scale + 2)
            if self.write_in_place:
                joined = torch.empty_like(x)
                joined[:, torch.arange(3)] = second
                joined[:, torch.arange(3, 6)] = first
                x = joined
            else:
                x = torch.cat([second, first], dim=1)
        return x, x.sum(1)

    def decode(self, z):
        raise AssertionError("its inverse is found without it")


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def dense(function, x):
    full = torch.autograd.functional.jacobian(function, x)
    rows = torch.arange(len(x))
    return full[rows, :, rows] if full.dim() == 4 else full


@pytest.mark.parametrize("write_in_place", [False, True])
def test_all_four_products_of_an_unknown_chain(write_in_place):
    net, x = Blocks(write_in_place), data(4, 6)
    model = ig.wrap(encode=net.encode, decode=net.decode).eval()
    (jacobian,) = Linearization(model, x).jacobians
    assert isinstance(jacobian, RecordedJacobian)
    J = dense(model, x)
    v, u = data(4, 6), data(4, 6) + 1
    same(jacobian.jvp(v), torch.einsum("bij,bj->bi", J, v))
    same(jacobian.vjp(u), torch.einsum("bij,bi->bj", J, u))
    same(jacobian.inverse_jvp(u), torch.linalg.solve(J, u))
    same(jacobian.inverse_vjp(v), torch.linalg.solve(J.mT, v))


@given(st.integers(0, 2**16), st.integers(1, 5))
def test_products_are_transposes_and_inverses_at_any_weights(seed, batch):
    torch.manual_seed(seed)
    net, x = Blocks(), torch.randn(batch, 6)
    model = ig.wrap(encode=net.encode, decode=net.decode).eval()
    (jacobian,) = Linearization(model, x).jacobians
    v, u = torch.randn(batch, 6), torch.randn(batch, 6)
    torch.testing.assert_close((jacobian.jvp(v) * u).sum(), (jacobian.vjp(u) * v).sum())
    condition = torch.linalg.cond(dense(model, x)).max().item()
    torch.testing.assert_close(
        jacobian.inverse_jvp(jacobian.jvp(v)), v, rtol=0, atol=1e-13 * condition * v.abs().max()
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.eval()

    def forward(self, x):
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.norm(x + mixed).relu_() * x.softmax(-1)


NETWORKS = {
    "attention": (Attention, (3, 5, 4)),
    "strided convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.GELU(),
            nn.ConvTranspose2d(4, 2, 2, stride=2), nn.AvgPool2d(2),
        ),
        (3, 2, 8, 8),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ELU(inplace=True)), (3, 4),
    ),
    "one-dimensional convolutions": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten()), (3, 2, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, shape = NETWORKS[name]
    module, x = make().eval(), data(*shape)
    found = linearize_function(module, x, module=module)
    assert isinstance(found, RecordedNetwork)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward mode
        known = AutogradNetwork(module, x)
    v, u = data(2, *shape), data(2, *known.output.shape)
    same(found.jvp(v), known.jvp(v))
    same(found.vjp(u), known.vjp(u))
    same(found.jvp(v[0]), known.jvp(v[0]))


class Lying(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


def test_what_autograd_contradicts_is_not_used():
    layer = ig.wrap(encode=Lying.apply, decode=lambda z: z / 2)
    x = data(3, 4)
    known = AutogradJacobian(layer, layer.inverse, x)
    assert recorded_jacobian(layer.eval(), x, known) is known


def test_nothing_is_recorded_in_training_mode():
    module, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), data(3, 4)
    before = module[1].num_batches_tracked.clone()
    assert isinstance(linearize_function(module, x, module=module), AutogradNetwork)
    assert module[1].num_batches_tracked == before + 1


def test_the_module_is_left_as_it_was():
    module, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), data(3, 4)
    before = {
        key: (value, value.clone()) for key, value in module.state_dict(keep_vars=True).items()
    }
    linearize_function(module, x, module=module)
    for key, value in module.state_dict(keep_vars=True).items():
        assert value is before[key][0]
        assert torch.equal(value, before[key][1])


def test_a_map_that_cannot_be_recorded_is_differentiated():
    model = ig.wrap(encode=lambda x: torch.vmap(torch.sin)(x) + x, decode=lambda z: z).eval()
    x = data(3, 4)
    product = Linearization(model, x).vjp(torch.ones(3, 4)).value()
    same(product, x.cos() + 1)


def test_samples_of_a_recorded_pass_are_selected():
    net, x = Blocks(), data(6, 6)
    # without a layer norm, which is differentiated by autograd, for all samples together
    net.nets = nn.ModuleList(
        nn.Sequential(nn.Linear(3, 7), nn.SiLU(), nn.Linear(7, 6)).eval() for _ in "ab"
    )
    model = ig.wrap(encode=net.encode, decode=net.decode).eval()
    (jacobian,) = Linearization(model, x).jacobians
    v = data(6, 6)
    for rows in (torch.tensor([4, 0]), torch.arange(6) > 2, torch.tensor([1, 1, 1])):
        part = jacobian.select(rows)
        for name in ("jvp", "vjp", "inverse_jvp", "inverse_vjp"):
            same(getattr(part, name)(v[rows]), getattr(jacobian, name)(v)[rows])
        assert part.output.equal(jacobian.output[rows])
        again = part.select(torch.tensor([0]))
        same(again.jvp(v[rows][:1]), part.jvp(v[rows])[:1])


class Tokens(nn.Module):
    """A linear map and an activation of (B, T, C), with the time steps outermost or innermost."""

    def __init__(self, outermost):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
        self.outermost = outermost
        self.eval()

    def forward(self, x):
        batch, steps, channels = x.shape
        if self.outermost:
            rows = x.transpose(0, 1).reshape(-1, channels)
            return (rows @ self.weight).tanh().view(steps, batch, channels).transpose(0, 1)
        return (x.reshape(-1, channels) @ self.weight).tanh().view(x.shape)


@pytest.mark.parametrize("outermost", [False, True])
def test_samples_are_selected_only_where_the_steps_keep_them_apart(outermost):
    net, x = Tokens(outermost), data(4, 4, 3)
    network = linearize_function(net, x, module=net)
    assert isinstance(network, RecordedNetwork)
    v, rows = data(4, 4, 3), torch.tensor([2, 0])
    part = network.select(rows)
    if outermost:
        assert part is None
    else:
        same(part.jvp(v[rows]), network.jvp(v)[rows])
        same(part.vjp(v[rows]), network.vjp(v)[rows])
