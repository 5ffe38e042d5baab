"""Glow: the invertible trunk of a classifier, and the generative flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from inn_guard.core.invertible import Invertible
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling, Coupling, NetworkMaker
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.multiscale import FactorOut, OnRemaining
from inn_guard.layers.networks import ConvNet, zero_last
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.reshape import Flatten, Squeeze, squeezed_shape
from inn_guard.layers.scales import ExpScale

__all__ = [
    "CIFAR_CLASSIFIER",
    "CIFAR_FLOW",
    "FLOW_GAN",
    "GlowConfig",
    "glow_classifier",
    "glow_flow",
    "projection_head",
]

#: (channels, network maker) -> a coupling layer
CouplingMaker = Callable[[int, NetworkMaker], Coupling]
#: channels -> a permutation or 1x1 convolution
MixingMaker = Callable[[int], Invertible]


@dataclass(frozen=True)
class GlowConfig:
    """What a Glow is built from.

    Attributes:
        levels: each starts with a squeeze by 2.
        blocks: how many of ActNorm, mixing and coupling each level has.
        hidden: channels of the couplings' networks.
        coupling: ``AffineCoupling.on_halves``, ``AdditiveCoupling.on_halves``, or
            ``functools.partial(AffineCoupling.on_halves, scale=squashed_sigmoid())``.
        mixing: ``InvertibleLinear``, ``LULinear``, ``Permutation.reverse``, or
            ``functools.partial(Permutation.shuffle, generator=...)``.
    """

    levels: int
    blocks: int
    hidden: int
    coupling: CouplingMaker = AffineCoupling.on_halves
    mixing: MixingMaker = InvertibleLinear

    def __post_init__(self) -> None:
        if min(self.levels, self.blocks, self.hidden) < 1:
            raise ValueError(
                f"expected positive sizes, got {self.levels} x {self.blocks} x {self.hidden}"
            )


#: Table 8 of the exploding-inverses paper: INN classifiers on CIFAR-10
CIFAR_CLASSIFIER = GlowConfig(levels=3, blocks=16, hidden=128)
#: Table 6 of the same: Glow trained by maximum likelihood
CIFAR_FLOW = GlowConfig(levels=3, blocks=32, hidden=512, mixing=Permutation.reverse)
#: Table 12 of the same: Glow trained as a GAN
FLOW_GAN = GlowConfig(levels=3, blocks=8, hidden=128, mixing=Permutation.reverse)


def glow_classifier(
    shape: Sequence[int] = (3, 32, 32), *, config: GlowConfig = CIFAR_CLASSIFIER
) -> Chain:
    """The invertible trunk of a classifier: squeeze and blocks per level, then flat features.

    Nothing is factored out.

    Args:
        shape: (C, H, W) of one image.
        config: sizes and kinds of layers.

    Returns:
        A chain (B, C, H, W) -> (B, C H W).

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), appendix G.

    >>> import torch
    >>> trunk = glow_classifier((3, 8, 8), config=GlowConfig(levels=2, blocks=1, hidden=4)).eval()
    >>> trunk(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 192])
    """
    layers: list[Invertible] = []
    for _ in range(config.levels):
        shape = squeezed_shape(shape)
        layers += [Squeeze(), *_blocks(shape[0], config)]
    return Chain(*layers, Flatten(shape))


def projection_head(features: int, classes: int) -> nn.Sequential:
    """BatchNorm1d - ReLU - Linear on features of ``glow_classifier``: (B, classes)."""
    return nn.Sequential(nn.BatchNorm1d(features), nn.ReLU(), nn.Linear(features, classes))


def glow_flow(shape: Sequence[int] = (3, 32, 32), *, config: GlowConfig = CIFAR_FLOW) -> Chain:
    """The generative Glow: every level but the last factors out half of its channels.

    What is factored out is first made standard normal given what remains, by one more affine
    coupling of scale exp(s). This is Glow's learned prior, written as a part of the map: the base
    density is N(0, I) throughout.

    Args:
        shape: (C, H, W) of one image.
        config: sizes and kinds of layers.

    Returns:
        A chain (B, C, H, W) -> (B, C H W).

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma, Dhariwal, 2018).
    """
    layers: list[Invertible] = []
    for level in range(config.levels):
        squeezed = squeezed_shape(shape)
        steps: list[Invertible] = [Squeeze(), *_blocks(squeezed[0], config)]
        remaining = shape
        if level == config.levels - 1:
            steps.append(Flatten(squeezed))
        else:
            out = FactorOut(squeezed)
            steps += [_prior(squeezed[0]), out]
            remaining = out.remaining_shape()
        # before the first factoring out there are no finished latents to leave alone
        if level > 0:
            steps = _on_remaining(steps, shape, squeezed)
        layers += steps
        shape = remaining
    return Chain(*layers)


def _blocks(channels: int, config: GlowConfig) -> list[Invertible]:
    """The blocks of one level: ActNorm, mixing and coupling each."""

    def network(kept: int, out: int) -> nn.Module:
        return zero_last(ConvNet(kept, config.hidden, out))

    blocks: list[Invertible] = []
    for _ in range(config.blocks):
        blocks += [ActNorm(channels), config.mixing(channels), config.coupling(channels, network)]
    return blocks


def _prior(channels: int) -> AffineCoupling:
    """The learned prior of one level as a coupling; it starts as the identity."""

    def convolution(kept: int, out: int) -> nn.Module:
        return zero_last(nn.Conv2d(kept, out, 3, padding=1))

    return AffineCoupling.on_halves(channels, convolution, scale=ExpScale())


def _on_remaining(
    steps: Sequence[Invertible], shape: Sequence[int], squeezed: Sequence[int]
) -> list[Invertible]:
    """A level after finished latents: the first step squeezes, the last one flattens."""
    flat = [math.prod(squeezed)]
    latent_shapes = [squeezed] * (len(steps) - 1) + [flat]
    data_shapes = [shape, *latent_shapes[:-1]]
    return [
        OnRemaining(step, shape=before, latent_shape=after)
        for step, before, after in zip(steps, data_shapes, latent_shapes, strict=True)
    ]
