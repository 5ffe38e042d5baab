"""The bound rules of the layers: what each layer is in the terms of inn_guard.lipschitz."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.autoregressive import MaskedAutoregressive
from inn_guard.layers.contraction import LipSwish
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling, Coupling
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.linear import ChannelMixing, InvertibleLinear
from inn_guard.layers.multiscale import FactorOut, OnRemaining
from inn_guard.layers.networks import Conditional
from inn_guard.layers.partition import Halves, Leading, Mask
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.reshape import Flatten, Squeeze, ZeroPadding
from inn_guard.layers.residual import Residual
from inn_guard.layers.scales import (
    ClampedScale,
    ExpScale,
    ScaleFunction,
    SigmoidScale,
    SoftplusScale,
)
from inn_guard.lipschitz.maps import coupling as couplings
from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps import residual as flows
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.composition import OnTail, inverted
from inn_guard.lipschitz.maps.elementary import ShapeDependent
from inn_guard.lipschitz.networks.activations import Activation, activation, known_activation
from inn_guard.lipschitz.networks.graph import readable
from inn_guard.lipschitz.transformers.affine import (
    Additive,
    Affine,
    ConstantScale,
    LogScale,
    ScaleBounds,
    SigmoidScaleBounds,
    SoftplusScaleBounds,
    atan_activation,
    scaled,
)

__all__ = ["scale_bounds"]


def scale_bounds(scale: ScaleFunction) -> ScaleBounds:
    """Enclosures of a scale function: by its formula where it is one of ours, by its global constants otherwise."""
    if isinstance(scale, SigmoidScale):
        return SigmoidScaleBounds(scale.lower, scale.upper, scale.offset)
    if isinstance(scale, ClampedScale):
        return LogScale(atan_activation(scale.clamp * 2 / math.pi))
    if isinstance(scale, SoftplusScale):
        return SoftplusScaleBounds(scale.lower)
    if isinstance(scale, ExpScale):
        return LogScale(known_activation(nn.Identity()))
    return ConstantScale(scale.lower, scale.upper, scale.max_slope, scale.max_log_slope)


def _coupling(layer: Coupling, transformer: Any, parameters: int) -> BoundedMap:
    def make(channels: int, shape: torch.Size) -> BoundedMap:
        split: couplings.Split
        if isinstance(layer.partition, (Halves, Leading)):
            index = torch.arange(channels)[None]
            kept, changed = layer.partition.split(index, dims=2)
            split, size = couplings.ByChannel(kept[0], changed[0]), changed.shape[1]
        elif isinstance(layer.partition, Mask):
            split, size = couplings.ByMask(layer.partition.mask.cpu().expand(shape)), channels
        else:
            return NoRule(f"no rule for the partition {type(layer.partition).__name__}")
        rows = torch.arange(parameters * size).split(size)
        return couplings.Coupling(split, layer.network, transformer, rows, layer.context)

    return ShapeDependent(lambda box: make(box.shape[0], box.shape), (layer.network,))


@bounded_map.register
def _(block: AdditiveCoupling, layer: Any) -> BoundedMap:
    return _coupling(block, Additive(), 1)


@bounded_map.register
def _(block: AffineCoupling, layer: Any) -> BoundedMap:
    return _coupling(block, Affine(scale_bounds(block.scale)), 2)


@bounded_map.register
def _(block: MaskedAutoregressive, layer: Any) -> BoundedMap:
    def make(features: int) -> BoundedMap:
        every, rows = torch.arange(features), torch.arange(2 * features).split(features)
        split = couplings.ByChannel(every, every)
        return flows.Autoregressive(
            couplings.Coupling(split, block.network, Affine(scale_bounds(block.scale)), rows)
        )

    return ShapeDependent(lambda box: make(box.shape[0]), (block.network,))


@bounded_map.register
def _(block: InverseLayer, layer: Any) -> BoundedMap:
    inner = block.inner.with_context(layer.context)
    described = bounded_map(inner.block, inner)
    if isinstance(described, maps.Rearrangement):
        return maps.Rearrangement(
            block.forward, None if described.channels is None else described.channels.argsort()
        )
    return inverted(described)


@bounded_map.register
def _(block: Diagonal, layer: Any) -> BoundedMap:
    return maps.Diagonal(block.log_scale.detach().double().exp(), block.shift.detach())


@bounded_map.register
def _(block: ChannelMixing, layer: Any) -> BoundedMap:
    return maps.LinearMap.computed(block.weight.detach())


@bounded_map.register
def _(block: InvertibleLinear, layer: Any) -> BoundedMap:
    return maps.LinearMap(block.weight.detach())


@bounded_map.register
def _(block: Permutation, layer: Any) -> BoundedMap:
    return maps.Rearrangement(block.forward, block.order.cpu())


@bounded_map.register(Squeeze)
@bounded_map.register(Flatten)
@bounded_map.register(FactorOut)
def _(block: Any, layer: Any) -> BoundedMap:
    return maps.Rearrangement(block.forward)


@bounded_map.register
def _(block: ZeroPadding, layer: Any) -> BoundedMap:
    return maps.Rearrangement(block.forward)


@bounded_map.register
def _(block: OnRemaining, layer: Any) -> BoundedMap:
    inner = block.layer if layer.context is None else block.layer.with_context(layer.context)
    return OnTail(bounded_map(inner.block, inner), block.shape)


@bounded_map.register
def _(block: Logit, layer: Any) -> BoundedMap:
    return flows.LogitMap(block.alpha)


@bounded_map.register
def _(block: Residual, layer: Any) -> BoundedMap:
    return flows.Residual(block.network, layer.context)


@bounded_map.register
def _(block: MaskedAutoregressive, layer: Any) -> BoundedMap:
    def make(features: int) -> BoundedMap:
        every = torch.arange(features)
        rows = torch.arange(2 * features).split(features)
        both = couplings.Coupling(
            couplings.ByChannel(every, every),
            block.network,
            Affine(scale_bounds(block.scale)),
            rows,
        )
        return flows.Autoregressive(both)

    return ShapeDependent(lambda box: make(box.shape[0]), (block.network,))


class _Joined(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Any, context: Any) -> Any:
        return self.network(torch.cat([x, context], 1))


@readable.register
def _(module: Conditional) -> nn.Module:
    return _Joined(module.network)


@activation.register
def _(module: LipSwish) -> Activation:
    rate = float(functional.softplus(module.raw.detach().double()))
    return scaled(known_activation(nn.SiLU()), 1 / (1.1 * rate), rate)
