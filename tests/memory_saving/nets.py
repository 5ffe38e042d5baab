"""Small nets and awkward layers for the tests of memory-saving backpropagation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible, NotApplicable
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import MLP, Conditional
from inn_guard.layers.partition import Halves
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.scales import ExpScale
from inn_guard.models.glow import GlowConfig, glow_classifier, glow_flow
from tests.cases.case import randomize, seeded

FEATURES, BATCH = 6, 5


def nll(z: Tensor, log_det: Tensor) -> Tensor:
    return (0.5 * z.flatten(1).square().sum(1) - log_det).mean()


def coupling(*, scale=None, network=None) -> AffineCoupling:
    network = MLP([FEATURES // 2, 8, FEATURES], activation=nn.Tanh) if network is None else network
    return AffineCoupling(network, scale=scale)


def flow(blocks: int = 3) -> Chain:
    """ActNorm, 1x1, affine coupling, reversal, additive coupling; in evaluation mode."""
    layers: list[Invertible] = []
    with seeded(1):
        for _ in range(blocks):
            additive = AdditiveCoupling(MLP([FEATURES // 2, 8, FEATURES // 2], activation=nn.Tanh))
            layers += [ActNorm(FEATURES), InvertibleLinear(FEATURES), coupling()]
            layers += [Permutation.reverse(FEATURES), additive]
        net = Chain(*layers)
        randomize(net, 0.2)
    return net.eval()


def conditional_flow() -> Chain:
    layers: list[Invertible] = []
    with seeded(2):
        for _ in range(3):
            network = Conditional(MLP([FEATURES // 2 + 2, 8, FEATURES], activation=nn.Tanh))
            layers += [coupling(network=network), Permutation.reverse(FEATURES)]
        net = Chain(*layers)
        randomize(net, 0.2)
    return net.eval()


def glow() -> Chain:
    with seeded(3):
        net = glow_classifier((3, 8, 8), config=GlowConfig(levels=2, blocks=2, hidden=4))
        randomize(net, 0.05)
    return net.eval()


def multiscale() -> Chain:
    with seeded(4):
        net = glow_flow((3, 8, 8), config=GlowConfig(levels=2, blocks=1, hidden=4))
        randomize(net, 0.05)
    return net.eval()


def vectors(batch: int = BATCH) -> Tensor:
    return torch.randn(
        batch, FEATURES, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )


def images(batch: int = 3) -> Tensor:
    return torch.randn(
        batch, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )


def exploding(blocks: int = 12) -> Chain:
    """In each block the second half is added to the first one and then shrunk by e^4.

    The inverse magnifies rounding errors by e^4 a block. Gradients of early layers do not vanish.
    """
    half = FEATURES // 2
    with seeded(5):
        layers: list[Invertible] = []
        for _ in range(blocks):
            mixing = AdditiveCoupling(
                MLP([half, 8, half], activation=nn.Tanh), partition=Halves(swapped=True)
            )
            shrinking = coupling(scale=ExpScale())
            nn.init.constant_(shrinking.network[-1].bias[half:], -4.0)
            layers += [mixing, shrinking]
        return Chain(*layers).eval()


class TwoSided(Invertible):
    """z2 = x2 + f(x1), z1 = x1 + g(z2): the inverse evaluates g before f."""

    def __init__(self, make) -> None:
        super().__init__()
        self.f, self.g = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        z2 = x2 + self.f(x1)
        return torch.cat([x1 + self.g(z2), z2], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        z1, z2 = z.chunk(2, dim=1)
        x1 = z1 - self.g(z2)
        return torch.cat([x1, z2 - self.f(x1)], dim=1)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x), x.new_zeros(len(x))


class NoInverse(Invertible):
    """z = x + tanh(w x) / 2, said to have no inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.w * x) / 2

    def inverse(self, z: Tensor) -> Tensor:
        raise NotApplicable("no inverse here")

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        slope = 1 + self.w * (1 - torch.tanh(self.w * x).square()) / 2
        return self.forward(x), slope.log().sum(1)


class Counted(nn.Module):
    """A network that counts its evaluations."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x)
