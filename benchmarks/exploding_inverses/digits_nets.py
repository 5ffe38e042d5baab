"""Three affine-coupling nets over 8x8 digits, and the classifier on top: ours, FrEIA's and nflows', of equal depth."""

from __future__ import annotations

from collections.abc import Callable

import FrEIA.framework
import FrEIA.modules
import torch
from nflows.transforms import AffineCouplingTransform, CompositeTransform
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.invertible import Invertible
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.partition import Halves
from inn_guard.layers.reshape import Flatten

__all__ = ["NETS", "Classifier"]

SHAPE = (1, 8, 8)
SIZE = 64
CLASSES = 10


def plain(blocks: int, width: int) -> Invertible:
    """Affine couplings with Glow's scale sigmoid(h + 2) in (0, 1), its inverse unbounded, and learned diagonals."""
    sizes = [SIZE // 2, width, width, SIZE]
    couplings = (AffineCoupling(MLP(sizes), partition=Halves(swapped=k % 2 == 1)) for k in range(blocks))
    return Chain(*(step for coupling in couplings for step in (coupling, Diagonal(SIZE))))


def freia(blocks: int, width: int) -> Invertible:
    """FrEIA's GLOWCouplingBlock (two couplings each) as its tutorial stacks them; log-scales clamped to (-2, 2)."""
    net = FrEIA.framework.SequenceINN(SIZE)
    for k in range(blocks // 2):
        net.append(FrEIA.modules.PermuteRandom, seed=k)
        net.append(
            FrEIA.modules.GLOWCouplingBlock, subnet_constructor=lambda n, m: MLP([n, width, width, m]), clamp=2.0
        )
    return wrap(net)


def nflows(blocks: int, width: int) -> Invertible:
    """nflows' AffineCouplingTransform with alternating halves; scale sigmoid(h + 2) + 1e-3 in (0.001, 1.001)."""
    first_half = torch.arange(SIZE) < SIZE // 2
    masks = (first_half if k % 2 else ~first_half for k in range(blocks))

    def network(n: int, m: int) -> nn.Module:
        return _Unconditional([n, width, width, m])

    return wrap(CompositeTransform([AffineCouplingTransform(mask.int(), network) for mask in masks]))


class _Unconditional(MLP):
    """nflows hands every network a context, which is None here."""

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return super().forward(x)


NETS: dict[str, Callable[[int, int], Invertible]] = {"plain": plain, "FrEIA": freia, "nflows": nflows}


class Classifier(nn.Module):
    """BatchNorm - ReLU - Linear on the latent of an invertible net over images (B, 1, 8, 8)."""

    def __init__(self, net: Invertible) -> None:
        super().__init__()
        self.inn = Chain(Flatten(SHAPE), net)
        self.head = nn.Sequential(nn.BatchNorm1d(SIZE), nn.ReLU(), nn.Linear(SIZE, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.head(self.inn(x))
