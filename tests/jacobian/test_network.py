"""The graph-free tangent of feed-forward networks against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inn_guard.jacobian.network import (
    ACTIVATIONS,
    AutogradNetwork,
    InputSliceJacobian,
    linearize_network,
)

VECTOR, IMAGE = (3, 5), (3, 4, 6, 6)


class TwoPaths(nn.Module):
    """No Sequential: differentiated by autograd."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x):
        return self.a(x).tanh() * self.b(x)


class Shifted(nn.Sequential):
    """A Sequential whose forward is its own."""

    def forward(self, x):
        return super().forward(x) * 2 + 1


def hooked() -> nn.Module:
    module = nn.Linear(5, 5)
    module.register_forward_hook(lambda module, inputs, output: output * 3)
    return module


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)), nn.ReLU(), nn.Linear(7, 3)
    )


NETWORKS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ELU(), nn.Linear(16, 3)
        ),
        VECTOR,
    ),
    "no bias": (lambda: nn.Linear(5, 3, bias=False), VECTOR),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Identity(), nn.SiLU()),
        VECTOR,
    ),
    "activation first": (lambda: nn.Sequential(nn.Tanh(), nn.ReLU(), nn.Linear(5, 2)), VECTOR),
    "in place": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ELU(inplace=True), nn.Linear(6, 2)),
        VECTOR,
    ),
    "unknown": (TwoPaths, VECTOR),
    "unknown inside": (
        lambda: nn.Sequential(nn.Linear(5, 5), TwoPaths(), nn.ReLU(), nn.Linear(4, 2)),
        VECTOR,
    ),
    "own forward": (lambda: Shifted(nn.Linear(5, 4), nn.Tanh()), VECTOR),
    "hook": (lambda: nn.Sequential(hooked(), nn.Tanh()), VECTOR),
    "weight norm": (normalized, VECTOR),
    "dropout in eval": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2)).eval(),
        VECTOR,
    ),
    "glow": (
        lambda: nn.Sequential(
            *(
                nn.Conv2d(4, 8, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(8, 8, 1),
                nn.ReLU(),
                nn.Conv2d(8, 6, 3, padding=1),
            )
        ),
        IMAGE,
    ),
    "stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGE),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), IMAGE),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), IMAGE),
    "uneven kernel": (lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1)), IMAGE),
    "wide padding": (lambda: nn.Conv2d(4, 6, 3, padding=4), IMAGE),
    "padded 1x1": (lambda: nn.Conv2d(4, 6, 1, padding=1), IMAGE),
    "padding same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), IMAGE),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), IMAGE),
}
NETWORKS |= {
    kind.__name__: (lambda kind=kind: nn.Sequential(nn.Linear(5, 9), kind()), VECTOR)
    for kind in ACTIVATIONS
}


@pytest.fixture(params=NETWORKS)
def network_and_x(request):
    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    return make(), torch.randn(shape)


def assert_equal(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-12 * (1 + expected.norm())


def test_both_products_equal_autograd(network_and_x):
    network, x = network_and_x
    fast, slow = linearize_network(network, x), AutogradNetwork(network, x)
    assert_equal(fast.output, network(x).detach())
    v, u = torch.randn_like(x), torch.randn_like(slow.output)
    assert_equal(fast.jvp(v), slow.jvp(v))
    assert_equal(fast.vjp(u), slow.vjp(u))


def test_leading_dimensions_are_that_many_products(network_and_x):
    network, x = network_and_x
    tangent = linearize_network(network, x)
    v, u = torch.randn(2, 3, *x.shape), torch.randn(2, 3, *tangent.output.shape)
    many_v, many_u = tangent.jvp(v), tangent.vjp(u)
    for i in range(2):
        for j in range(3):
            assert_equal(many_v[i, j], tangent.jvp(v[i, j]))
            assert_equal(many_u[i, j], tangent.vjp(u[i, j]))


def test_arguments_are_not_written(network_and_x):
    network, x = network_and_x
    tangent = linearize_network(network, x)
    v, u = torch.randn_like(x), torch.randn_like(tangent.output)
    before = x.clone(), v.clone(), u.clone()
    tangent.jvp(v)
    tangent.vjp(u)
    assert all(torch.equal(a, b) for a, b in zip((x, v, u), before, strict=True))


def test_what_is_feed_forward_needs_no_autograd(network_and_x, request):
    network, x = network_and_x
    by_autograd = {"unknown", "unknown inside", "own forward", "hook", "padding same", "circular"}
    name = request.node.callspec.params["network_and_x"]
    tangent = linearize_network(network, x)
    steps = getattr(tangent, "steps", [tangent])
    assert any(isinstance(step, AutogradNetwork) for step in steps) == (name in by_autograd)


def test_dropout_in_training_is_left_to_autograd():
    network = nn.Dropout(0.5)
    assert isinstance(linearize_network(network.train(), torch.randn(2, 3)), AutogradNetwork)
    assert not isinstance(linearize_network(network.eval(), torch.randn(2, 3)), AutogradNetwork)


def test_partial_tangent_holds_the_last_channels():
    network, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(4, 5)
    partial = InputSliceJacobian(linearize_network(network, x), channels=2, held=3)
    slow = AutogradNetwork(lambda first: network(torch.cat([first, x[:, 2:]], 1)), x[:, :2])
    v, u = torch.randn(4, 2), torch.randn(4, 3)
    assert_equal(partial.jvp(v), slow.jvp(v))
    assert_equal(partial.vjp(u), slow.vjp(u))
    assert_equal(partial.jvp(v.expand(3, 4, 2)), slow.jvp(v).expand(3, 4, 3))


def test_steps_of_a_chain_hold_no_values_that_products_do_not_need():
    chain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(7, 4)
    tangent = linearize_network(chain, x)
    assert torch.equal(tangent.output, chain(x))
    assert all(step.output.untyped_storage().nbytes() == x.element_size() for step in tangent.steps)
    few = tangent.select(torch.tensor([2, 5]))
    assert torch.equal(few.output, chain(x)[[2, 5]])
    v = torch.randn(7, 4)
    assert torch.allclose(few.jvp(v[[2, 5]]), tangent.jvp(v)[[2, 5]])
