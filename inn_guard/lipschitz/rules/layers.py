"""The bound rules of this package's layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from inn_guard.core.readable import class_of_call, is_plain
from inn_guard.layers import coupling as layers
from inn_guard.layers import scales
from inn_guard.layers.actnorm import ActNorm, Diagonal
from inn_guard.layers.autoregressive import MaskedAutoregressive
from inn_guard.layers.contraction import LipSwish
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.linear import ChannelMixing, InvertibleLinear, LULinear
from inn_guard.layers.multiscale import FactorOut, OnRemaining
from inn_guard.layers.networks import Conditional
from inn_guard.layers.partition import Halves, Leading, Mask
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.reshape import Flatten, Squeeze, ZeroPadding
from inn_guard.layers.residual import Residual
from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps import residual
from inn_guard.lipschitz.maps.autoregressive import Autoregressive
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.composition import OnTail, inverted
from inn_guard.lipschitz.maps.coupling import ByChannel, ByMask, Coupling, Split, blocked_rows
from inn_guard.lipschitz.networks.activations import (
    Activation,
    activation,
    atan_activation,
    known_activation,
    scaled,
)
from inn_guard.lipschitz.networks.graph import fx_equivalent
from inn_guard.lipschitz.transformers.affine import (
    EXPONENTIAL,
    Additive,
    Affine,
    ConstantScale,
    LogScale,
    SigmoidScaleBounds,
    SoftplusScaleBounds,
)
from inn_guard.lipschitz.transformers.base import ScaleBounds, Transformer
from inn_guard.numerics.intervals import Interval

__all__ = ["scale_bounds"]

SCALES = (scales.SigmoidScale, scales.ClampedScale, scales.SoftplusScale, scales.ExpScale)
FOREIGN_SCALE = "a scale that overrides a method of one in inn_guard"


def scale_bounds(scale: scales.ScaleFunction) -> ScaleBounds | None:
    """Enclosures of a scale: by the formula of one in inn_guard, else by its global constants.

    None for a subclass with other formulas: its constants may be those of its parent.
    """
    kind = class_of_call(scale, SCALES)
    known: Any = scale
    if kind is scales.SigmoidScale:
        return SigmoidScaleBounds(known.lower, known.upper, known.offset)
    if kind is scales.ClampedScale:
        return LogScale(atan_activation(known.clamp * 2 / math.pi))
    if kind is scales.SoftplusScale:
        return SoftplusScaleBounds(known.lower)
    if kind is scales.ExpScale:
        return EXPONENTIAL
    if isinstance(scale, SCALES):
        return None
    return ConstantScale(scale.lower, scale.upper, scale.max_slope, scale.max_log_slope)


def _coupling(block: layers.Coupling, transformer: Transformer) -> BoundedMap:
    def make(box: Interval) -> BoundedMap:
        found = _split(block.partition, box.shape)
        if found is None:
            return NoRule(f"no rule for the partition {type(block.partition).__name__}")
        split, entries = found
        rows = blocked_rows(entries, transformer.count)
        return Coupling(split, block.network, transformer, rows, block.context)

    return maps.ShapeDependent(make, (block.network,))


def _split(partition: Any, shape: torch.Size) -> tuple[Split, int] | None:
    """The split of samples of a shape, with the number of changed channels."""
    if is_plain(partition, Mask):
        return ByMask(partition.mask.cpu().expand(shape)), shape[0]
    if not is_plain(partition, Halves, Leading):
        return None
    kept, changed = partition.split(torch.arange(shape[0])[None], dims=2)
    return ByChannel(kept[0], changed[0]), changed.shape[1]


@bounded_map.register
def bound_additive_coupling(block: layers.AdditiveCoupling, layer: Any) -> BoundedMap:
    return _coupling(block, Additive())


@bounded_map.register
def bound_affine_coupling(block: layers.AffineCoupling, layer: Any) -> BoundedMap:
    scale = scale_bounds(block.scale)
    if scale is None:
        return NoRule(FOREIGN_SCALE)
    return _coupling(block, Affine(scale))


@bounded_map.register
def bound_masked_autoregressive(block: MaskedAutoregressive, layer: Any) -> BoundedMap:
    scale = scale_bounds(block.scale)
    if scale is None:
        return NoRule(FOREIGN_SCALE)
    transformer = Affine(scale)

    def make(box: Interval) -> BoundedMap:
        features = box.shape[0]
        rows = blocked_rows(features, transformer.count)
        split = ByChannel.all_of(features)
        return Autoregressive(Coupling(split, block.network, transformer, rows))

    return maps.ShapeDependent(make, (block.network,))


@bounded_map.register
def bound_inverse_layer(block: InverseLayer, layer: Any) -> BoundedMap:
    inner = block.inner.with_context(layer.context)
    bounded = bounded_map(inner.block, inner)
    if not isinstance(bounded, maps.Rearrangement):
        return inverted(bounded)
    channels = None
    if bounded.channels is not None:
        channels = bounded.channels.argsort()
    return maps.Rearrangement(block.forward, channels)


@bounded_map.register(ActNorm)
@bounded_map.register(Diagonal)
def bound_diagonal(block: Any, layer: Any) -> BoundedMap:
    if block.training and not bool(getattr(block, "initialized", True)):
        return NoRule("ActNorm will be initialised by its next batch; call the model on data first")
    return maps.Diagonal(block.log_scale.detach().double().exp(), block.shift.detach())


@bounded_map.register
def bound_channel_mixing(block: ChannelMixing, layer: Any) -> BoundedMap:
    return maps.LinearMap.computed(block.weight.detach())


@bounded_map.register
def bound_lu_linear(block: LULinear, layer: Any) -> BoundedMap:
    # the inverse transposes the permutation and divides by the signs
    identity = torch.eye(len(block.pivots)).to(block.pivots)
    if not torch.equal(block.pivots @ block.pivots.T, identity):
        return NoRule("its pivots are no permutation: its inverse is another map's")
    return maps.LinearMap.product(block.pivots, *block._factors())


@bounded_map.register
def bound_invertible_linear(block: InvertibleLinear, layer: Any) -> BoundedMap:
    return maps.LinearMap(block.weight.detach())


@bounded_map.register
def bound_permutation(block: Permutation, layer: Any) -> BoundedMap:
    return maps.Rearrangement(block.forward, block.order.cpu())


@bounded_map.register(Squeeze)
@bounded_map.register(Flatten)
@bounded_map.register(FactorOut)
@bounded_map.register(ZeroPadding)
def bound_reshape(block: Any, layer: Any) -> BoundedMap:
    return maps.Rearrangement(block.forward)


@bounded_map.register
def bound_on_remaining(block: OnRemaining, layer: Any) -> BoundedMap:
    inner = block.inner
    if layer.context is not None:
        inner = inner.with_context(layer.context)
    return OnTail(bounded_map(inner.block, inner), block.shape)


@bounded_map.register
def bound_logit(block: Logit, layer: Any) -> BoundedMap:
    return maps.LogitMap(block.alpha)


@bounded_map.register
def bound_residual(block: Residual, layer: Any) -> BoundedMap:
    return residual.Residual(block.network, layer.context)


class _Joined(nn.Module):
    """A network of x and a context, joined."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    # called by torch.fx, whose proxies are no tensors
    def forward(self, x: Any, context: Any) -> Any:
        return self.network(torch.cat([x, context], 1))


@fx_equivalent.register
def join_context(module: Conditional) -> nn.Module:
    return _Joined(module.network)


@activation.register
def enclose_lipswish(module: LipSwish) -> Activation:
    rate = float(functional.softplus(module.raw.detach().double()))
    return scaled(known_activation(nn.SiLU()), 1 / (1.1 * rate), rate)
