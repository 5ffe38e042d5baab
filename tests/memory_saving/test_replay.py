from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.layers.networks import MLP
from inn_guard.memory_saving import memory_saving
from tests.cases.trials import first
from tests.memory_saving import nets
from tests.memory_saving.test_model import assert_close, moments

HALF = nets.FEATURES // 2


def with_dropout(out=HALF):
    return nn.Sequential(nn.Linear(HALF, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, out))


def with_batch_norm(out=HALF):
    return nn.Sequential(nn.Linear(HALF, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, out))


def with_spectral_norm(out=HALF):
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(16, out))
    return nn.Sequential(nn.Linear(HALF, 16), nn.Tanh(), linear)


class Jitter(nn.Module):
    """Multiplies by numbers that numpy draws, in training mode."""

    def forward(self, x):
        return x * (1 + np.random.rand()) if self.training else x


def with_jitter(out=HALF):
    return nn.Sequential(nn.Linear(HALF, 16), nn.Tanh(), Jitter(), nn.Linear(16, out))


class NoisyLogDet(Invertible):
    """A linear layer whose log-determinant is estimated with a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        return x * self.w.exp()

    def inverse(self, z):
        return z * (-self.w).exp()

    def forward_and_log_det(self, x):
        v = torch.randn(x.shape, generator=self.generator)
        return self.forward(x), (v * v * self.w).sum(1)


NETWORKS = {
    "dropout": with_dropout,
    "batch_norm": with_batch_norm,
    "spectral_norm": with_spectral_norm,
    "jitter": with_jitter,
}


def generators():
    """The states of the global random number generators."""
    _, numpy_state, *position = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy_state.tolist(), position


def seed_generators():
    torch.manual_seed(5)
    np.random.seed(5)


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def network(request):
    return request.param


@pytest.fixture(params=["fused", "two_sided"])
def model(request, network):
    def layer():
        if request.param == "fused":
            return nets.coupling(network=network(2 * HALF))
        return nets.TwoSided(network)

    return Chain(nets.flow(1), layer(), nets.flow(1), layer(), layer()).train()


@pytest.mark.parametrize("guard", first(1, [1e-6, None]))
def test_gradient_statistics_and_generators_are_those_of_plain_training(model, guard):
    twin, x = copy.deepcopy(model), nets.vectors(9)
    results = []
    for net, f in ((model, memory_saving(model, guard=guard)), (twin, twin)):
        seed_generators()
        loss = nets.nll(*f.forward_and_log_det(x)) + moments(f(x))  # two calls, one backward
        after_forward = generators()
        loss.backward()
        assert generators() == after_forward
        results.append(([p.grad for p in net.parameters()], list(net.buffers()), after_forward))
    (found, buffers, state), (expected, expected_buffers, expected_state) = results
    assert_close(found, expected)
    for a, b in zip(buffers, expected_buffers, strict=True):
        assert torch.equal(a, b)
    assert state == expected_state


def test_only_what_cannot_be_replayed_is_stored():
    """The input of a layer is stored where random numbers meet an inverse that is not fused."""
    fused = nets.coupling(network=nets.Counted(with_dropout(2 * HALF)))
    model = Chain(nets.flow(1), fused, nets.flow(1)).train()
    memory_saving(model)(nets.vectors()).sum().backward()
    assert fused.network.calls == 2

    two_sided = nets.TwoSided(lambda: nets.Counted(with_dropout()))
    model = Chain(nets.flow(1), two_sided, nets.flow(1)).train()
    memory_saving(model)(nets.vectors()).sum().backward()
    assert two_sided.f.calls == 2  # in the forward pass, and once more with a graph: no inverse


def test_evaluation_mode_moves_nothing(model):
    before = copy.deepcopy(model.state_dict())
    moments(memory_saving(model.eval())(nets.vectors())).backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_generators_of_the_layers_are_replayed():
    model = Chain(nets.flow(1), NoisyLogDet(), nets.flow(1), NoisyLogDet()).train()
    twin = copy.deepcopy(model)
    found = []
    for f in (memory_saving(model), twin):
        loss = nets.nll(*f.forward_and_log_det(nets.vectors())) + nets.nll(
            *f.forward_and_log_det(nets.vectors())
        )
        found.append([loss, *torch.autograd.grad(loss, list(f.parameters()))])
    assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_the_forward_pass(dtype):
    model = nets.flow().float()
    twin, x = copy.deepcopy(model), nets.vectors().float()
    found = []
    for f in (memory_saving(model), twin):
        with torch.autocast("cpu", dtype=dtype):
            z, log_det = f.forward_and_log_det(x)
            loss = nets.nll(z.float(), log_det.float())
        found.append((z.dtype, log_det.dtype, torch.autograd.grad(loss, list(f.parameters()))))
    assert found[0][:2] == found[1][:2]
    for a, b in zip(found[0][2], found[1][2], strict=True):
        assert (a - b).norm() <= 30 * torch.finfo(dtype).eps * (b.norm() + 0.1)


def test_weights_cast_without_a_graph_are_not_reused_with_one():
    """Backward inside the autocast block: the cache of cast weights is alive then."""
    network = MLP([HALF, 8, nets.FEATURES])
    model, x = Chain(nets.flow(1), nets.coupling(network=network)).float(), nets.vectors().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memory_saving(model)(x).float().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
