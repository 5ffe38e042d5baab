"""Invertible residual networks and residual flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from inn_guard.core.invertible import Invertible
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.chain import Chain
from inn_guard.layers.contraction import contractive_conv_net, contractive_mlp
from inn_guard.layers.reshape import Flatten, Squeeze, squeezed_shape
from inn_guard.layers.residual import Residual
from inn_guard.layers.residual_log_det import PowerSeries, ResidualLogDet, RussianRoulette

__all__ = [
    "IResNetConfig",
    "checkerboard_residual_flow",
    "iresnet",
    "power_series",
    "russian_roulette",
]

LogDetMaker = Callable[[int], ResidualLogDet]  #: seed -> how a layer's log-determinant is computed


def power_series(seed: int) -> ResidualLogDet:
    """The estimate of i-ResNets: ten terms of the power series and one probe."""
    return PowerSeries(seed=seed)


def russian_roulette(seed: int) -> ResidualLogDet:
    """The estimate of Residual Flows: eight terms, a random number of further ones, one probe."""
    return RussianRoulette(seed=seed)


@dataclass(frozen=True)
class IResNetConfig:
    """What an invertible residual network is built from.

    Attributes:
        levels: each starts with a squeeze by 2.
        blocks: how many of ActNorm and residual layer each level has.
        hidden: channels of the residual branches.
        coefficient: certified Lipschitz constant of every convolution, below 1.
        log_det: makes each layer's estimator from the layer's seed.
    """

    levels: int = 3
    blocks: int = 16
    hidden: int = 128
    coefficient: float = 0.9
    log_det: LogDetMaker = russian_roulette

    def __post_init__(self) -> None:
        if min(self.levels, self.blocks, self.hidden) < 1:
            raise ValueError(
                f"expected positive sizes, got {self.levels} x {self.blocks} x {self.hidden}"
            )
        if not 0 < self.coefficient < 1:
            raise ValueError(f"expected a coefficient between 0 and 1, got {self.coefficient}")


def iresnet(shape: Sequence[int], *, config: IResNetConfig) -> Chain:
    """Every level squeezes, then has ActNorm and residual layers; nothing is factored out.

    Args:
        shape: (C, H, W) of one image.
        config: sizes and estimators.

    Returns:
        A chain (B, C, H, W) -> (B, C H W).

    References:
        Invertible Residual Networks (Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, 2019).
        Residual Flows for Invertible Generative Modeling (Chen, Behrmann, Duvenaud, Jacobsen,
        2019).
    """
    layers: list[Invertible] = []
    for _ in range(config.levels):
        shape = squeezed_shape(shape)
        layers.append(Squeeze())
        for _ in range(config.blocks):
            network = contractive_conv_net(shape[0], config.hidden, coefficient=config.coefficient)
            # an estimator adds 1 to its seed at every call: seeds of layers lie 2^32 apart
            log_det = config.log_det(len(layers) << 32)
            layers += [ActNorm(shape[0]), Residual(network, log_det=log_det)]
    return Chain(*layers, Flatten(shape))


def checkerboard_residual_flow(
    *, blocks: int = 100, hidden: int = 128, coefficient: float = 0.8
) -> Chain:
    """Residual layers on the plane with branches of four hidden layers and exact log-determinants.

    Args:
        blocks: residual layers; 100 in the paper.
        hidden: width of the hidden layers; 128 in the paper.
        coefficient: certified Lipschitz constant of every linear map; 0.8 in the paper.

    Returns:
        A chain (B, 2) -> (B, 2).

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), appendix C, Table 4.
    """

    def branch() -> nn.Module:
        return contractive_mlp([2, *[hidden] * 4, 2], coefficient=coefficient)

    return Chain(*(Residual(branch()) for _ in range(blocks)))
