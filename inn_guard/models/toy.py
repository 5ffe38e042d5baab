"""Plain nets on vectors, as in the toy experiments of the exploding-inverses paper."""

from __future__ import annotations

from torch import nn

from inn_guard.core.invertible import Invertible
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.scales import ScaleFunction

__all__ = ["checkerboard_net", "regression_net"]


def checkerboard_net(
    *, scale: ScaleFunction | None = None, blocks: int = 100, hidden: int = 128
) -> Chain:
    """Affine couplings on the plane whose identity part alternates.

    The networks have four hidden layers with SiLU.

    Args:
        scale: ``squashed_sigmoid()`` for the stable variant. Default: sigmoid(s + 2) in (0, 1).
        blocks: couplings; 100 in the paper.
        hidden: width of the hidden layers; 128 in the paper.

    Returns:
        A chain (B, 2) -> (B, 2).

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), appendix C, Table 4.
    """

    def network(kept: int, out: int) -> nn.Module:
        return MLP([kept, *[hidden] * 4, out], activation=nn.SiLU)

    layers: list[Invertible] = []
    for k in range(blocks):
        layers.append(AffineCoupling.on_halves(2, network, swapped=k % 2 == 1, scale=scale))
    return Chain(*layers)


def regression_net(*, blocks: int = 16, hidden: int = 128, features: int = 2) -> Chain:
    """ActNorm, reverse permutation and affine coupling per block.

    The networks have two hidden layers with ReLU.

    Args:
        blocks: the paper does not print how many.
        hidden: width of the hidden layers; 128 in the paper.
        features: 2 in the paper.

    Returns:
        A chain (B, features) -> (B, features).

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), appendix F.
    """

    def network(kept: int, out: int) -> nn.Module:
        return MLP([kept, hidden, hidden, out])

    layers: list[Invertible] = []
    for _ in range(blocks):
        layers += [
            ActNorm(features),
            Permutation.reverse(features),
            AffineCoupling.on_halves(features, network),
        ]
    return Chain(*layers)
