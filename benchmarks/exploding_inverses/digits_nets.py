"""Nets of affine couplings for 8x8 digits, ours, FrEIA's and nflows', and their classifier.

A fixed random permutation before every coupling mixes the pixels, as the shuffle variants of the
paper do.
"""

from __future__ import annotations

from collections.abc import Callable

import FrEIA.framework
import FrEIA.modules
import torch
from nflows.transforms import AffineCouplingTransform, CompositeTransform, RandomPermutation
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.reshape import Flatten

__all__ = ["NETS", "Classifier"]

SHAPE = (1, 8, 8)
SIZE = 64
CLASSES = 10


def plain(blocks: int, width: int) -> Invertible:
    """Affine couplings with Glow's scale sigmoid(h + 2) in (0, 1), and learned diagonals."""
    steps: list[Invertible] = []
    for k in range(blocks):
        order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(k))
        steps += [
            Permutation(order),
            AffineCoupling(MLP([SIZE // 2, width, width, SIZE])),
            Diagonal(SIZE),
        ]
    return Chain(*steps)


def freia(blocks: int, width: int) -> Invertible:
    """FrEIA's GLOWCouplingBlock (two couplings each), log-scales clamped to (-2, 2)."""
    net = FrEIA.framework.SequenceINN(SIZE)
    for k in range(blocks // 2):
        net.append(FrEIA.modules.PermuteRandom, seed=k)
        net.append(
            FrEIA.modules.GLOWCouplingBlock,
            subnet_constructor=lambda n, m: MLP([n, width, width, m]),
            clamp=2.0,
        )
    return wrap(net)


def nflows(blocks: int, width: int) -> Invertible:
    """nflows' AffineCouplingTransform; scale sigmoid(h + 2) + 1e-3 in (0.001, 1.001)."""

    def network(n: int, m: int) -> nn.Module:
        return _Unconditional([n, width, width, m])

    first_half = (torch.arange(SIZE) < SIZE // 2).int()
    steps: list[nn.Module] = []
    for _ in range(blocks):
        steps += [RandomPermutation(SIZE), AffineCouplingTransform(first_half, network)]
    return wrap(CompositeTransform(steps))


class _Unconditional(MLP):
    """nflows hands every network a context, which is None here."""

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return super().forward(x)


NETS: dict[str, Callable[[int, int], Invertible]] = {
    "plain": plain,
    "FrEIA": freia,
    "nflows": nflows,
}


class Classifier(nn.Module):
    """BatchNorm - ReLU - Linear on the latent of an invertible net over images (B, 1, 8, 8)."""

    def __init__(self, net: Invertible) -> None:
        super().__init__()
        self.inn = Chain(Flatten(SHAPE), net)
        self.head = nn.Sequential(nn.BatchNorm1d(SIZE), nn.ReLU(), nn.Linear(SIZE, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.head(self.inn(x))
