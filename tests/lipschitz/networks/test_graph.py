"""Subnetworks: no bound below a sampled Jacobian, tighter than products, reasons for refusals."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from nflows.nn.nets import ResidualNet
from nflows.transforms.made import MADE
from torch import nn

from inn_guard.lipschitz.networks.conditioner import SearchBudget, analyse, subnetwork_lipschitz
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Box
from tests.cases.trials import first, trials

ACTIVATIONS = [
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardtanh,
    nn.ReLU6, nn.LogSigmoid,
]  # fmt: skip
EFFORT = SearchBudget(steps=8, seconds=1.0)


def jacobian_norms(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(1)
    J = torch.func.vmap(torch.func.jacrev(lambda v: module(v.reshape(1, *x.shape[1:])).flatten()))(
        flat
    )
    return torch.linalg.matrix_norm(J, 2)


def mlp(activation: type[nn.Module], sizes: list[int]) -> nn.Sequential:
    steps: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        steps += [nn.Linear(n, m), activation()]
        nn.init.normal_(steps[-2].weight, std=1.5 / math.sqrt(n))
    return nn.Sequential(*steps[:-1])


@pytest.mark.parametrize("activation", first(2, ACTIVATIONS))
def test_dense_networks_global_and_local(activation):
    for sizes in ([3, 8, 2], [2, 6, 6, 3], [1, 5, 5, 5, 1]):
        net = mlp(activation, sizes)
        x = 4 * torch.randn(100, sizes[0])
        assert jacobian_norms(net, x).max() <= subnetwork_lipschitz(
            net, Box.everywhere((sizes[0],)), effort=EFFORT
        )
        box = Box(-0.3 * torch.ones(sizes[0]), 0.2 * torch.ones(sizes[0]))
        inside = box.lo + (box.hi - box.lo) * torch.rand(100, sizes[0])
        local = subnetwork_lipschitz(net, box, effort=EFFORT)
        assert jacobian_norms(net, inside).max() <= local
        reading = analyse(net, box)
        values = net(inside)
        assert ((reading.output.lo <= values) & (values <= reading.output.hi)).all()


@trials(2, 8)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolutional_networks(mode, trials):
    for trial in range(trials):
        net = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, padding_mode=mode),
            nn.SiLU() if trial % 2 else nn.ReLU(),
            nn.Conv2d(6, 6, 1),
            nn.BatchNorm2d(6),
            nn.ELU(),
            nn.Conv2d(6, 2, 3, padding=1, padding_mode=mode),
        ).eval()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5)
        x = torch.randn(10, 2, 5, 4)
        bound = subnetwork_lipschitz(net, Box.everywhere((2, 5, 4)), effort=EFFORT)
        assert jacobian_norms(net, x).max() <= bound
        assert bound < 0.9 * analyse(net, Box.everywhere((2, 5, 4))).product()
        box = Box.around(0.1 * x)
        assert jacobian_norms(net, 0.1 * x).max() <= subnetwork_lipschitz(net, box, effort=EFFORT)


class ResidualConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x):
        y = self.b(self.a(x))  # two paddings in a row: the crop between them must not be forgotten
        return x + F.silu(y) + 0.5 * self.c(y)


class DenselyConcatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(7, 5), nn.Linear(12, 2)

    def forward(self, x):
        x = torch.cat([x, torch.tanh(self.a(x))], dim=1)
        x = torch.cat([x, F.gelu(self.b(x))], 1)
        return self.c(x)


@trials(3, 15)
def test_residual_convolutions_keep_their_place_on_the_torus(trials):
    for _ in range(trials):
        net = ResidualConv()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.6)
        x = torch.randn(10, 2, 4, 4)
        assert jacobian_norms(net, x).max() <= subnetwork_lipschitz(
            net, Box.everywhere((2, 4, 4)), effort=EFFORT
        )


def test_dense_concatenation():
    net = DenselyConcatenated()
    bound = subnetwork_lipschitz(net, Box.everywhere((3,)), effort=EFFORT)
    assert jacobian_norms(net, torch.randn(200, 3)).max() <= bound
    assert bound < analyse(net, Box.everywhere((3,))).product()


@pytest.mark.parametrize("batch_norm", [False, True])
def test_residual_net_and_made_of_nflows(batch_norm):
    net = ResidualNet(3, 4, 8, num_blocks=2, use_batch_norm=batch_norm).eval()
    made = MADE(4, 8, num_blocks=2, output_multiplier=2, use_batch_norm=batch_norm).eval()
    for module, size in ((net, 3), (made, 4)):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        bound = subnetwork_lipschitz(module, Box.everywhere((size,)), effort=EFFORT)
        assert jacobian_norms(module, torch.randn(100, size)).max() <= bound < math.inf


def test_weight_norm_and_spectral_norm():
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)),
        nn.LeakyReLU(0.2),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)),
    ).eval()
    bound = subnetwork_lipschitz(net, Box.everywhere((3,)), effort=EFFORT)
    assert jacobian_norms(net, torch.randn(100, 3)).max() <= bound < math.inf


def test_strides_and_transposes_fall_back_to_products():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(3, 1, 4, 2, 1)
    )
    bound = subnetwork_lipschitz(net, Box.everywhere((1, 6, 6)))
    assert jacobian_norms(net, torch.randn(20, 1, 6, 6)).max() <= bound < math.inf


def test_groups_and_dilation():
    net = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    bound = subnetwork_lipschitz(net, Box.everywhere((4, 5, 5)), effort=EFFORT)
    assert jacobian_norms(net, torch.randn(20, 4, 5, 5)).max() <= bound < math.inf


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "LayerNorm"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train(), "eval"),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train(), "training mode"),
        (nn.Softmax(1), "Softmax"),
    ],
)
def test_what_is_not_known_is_said(module, reason):
    with pytest.raises(Unbounded, match=reason):
        subnetwork_lipschitz(module, Box.everywhere((2,)))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        y = self.inner(x)
        y += 1.0
        z = nn.functional.relu(y, inplace=True)
        return z + y  # y is z by now


def test_what_is_changed_in_place_and_used_again_is_refused():
    with pytest.raises(Unbounded, match="in place"):
        subnetwork_lipschitz(InPlace(), Box.everywhere((2,)))
    subnetwork_lipschitz(
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 1)), Box.everywhere((2,))
    )


class Aliased(nn.Module):
    """y += 1 changes the value behind the other name, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        y = self.inner(x)
        other = y
        y += 1.0
        return torch.relu(other) + y


class Added(nn.Module):
    """A residual that is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        y = self.inner(x)
        y += x
        y *= 3.0
        return y


def test_additions_in_place_are_read_and_their_aliases_refused():
    with pytest.raises(Unbounded, match="in place"):
        subnetwork_lipschitz(Aliased(), Box.everywhere((2,)))
    net = Added()
    truth = torch.linalg.matrix_norm(3 * (net.inner.weight + torch.eye(2)), 2)
    assert truth <= subnetwork_lipschitz(net, Box.everywhere((2,))) <= 1.01 * truth


class DataDependent(nn.Module):
    def forward(self, x):
        return x * x if x.sum() > 0 else x


def test_data_dependent_control_flow_and_products_are_refused():
    with pytest.raises(Unbounded, match="graph"):
        subnetwork_lipschitz(DataDependent(), Box.everywhere((2,)))


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.before, self.after = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.after(self.function(self.before(x)))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.pow(h.abs() + 0.1, 1.7),
        lambda h: torch.where(torch.ones(4) > 0, h, 2 * h),
        lambda h: torch.xlogy(h, 1.7),
        lambda h: torch.var(h, h),
        lambda h: torch.zeros(h.shape) + h,
    ],
)
def test_functions_that_would_read_a_proxy_as_a_tensor_are_bounded_or_refused(function):
    """Torch ends the process where it takes a proxy for a tensor that has memory."""
    torch.manual_seed(0)
    net, box = Between(function), Box(-torch.ones(2), torch.ones(2))
    with contextlib.suppress(Unbounded):
        bound = subnetwork_lipschitz(net, box)
        assert jacobian_norms(net, 2 * torch.rand(100, 2) - 1).max() <= bound


def test_nothing_is_left_behind():
    net = mlp(nn.ReLU, [2, 4, 2])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    subnetwork_lipschitz(net, Box.everywhere((2,)), effort=EFFORT)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
