"""The bound rules of FrEIA: what its modules are in the terms of inn_guard.lipschitz, with its own clamps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import FrEIA.modules as Ff
import torch
from torch import Tensor, nn
from torch.nn import functional

from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps import residual as flows
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.composition import Composition
from inn_guard.lipschitz.maps.coupling import ByChannel, Coupling
from inn_guard.lipschitz.networks.activations import Activation, activation, known_activation
from inn_guard.lipschitz.rules.joined_networks import SideBySide
from inn_guard.lipschitz.transformers.affine import (
    Additive,
    Affine,
    LogScale,
    Transformer,
    atan_activation,
    scaled,
)


def _clamps() -> list[tuple[Callable[[Tensor], Tensor], Callable[[float], Activation]]]:
    sigmoid, tanh = known_activation(nn.Sigmoid()), known_activation(nn.Tanh())
    return [
        (lambda u: 0.636 * torch.atan(u), lambda c: atan_activation(0.636 * c)),
        (torch.tanh, lambda c: scaled(tanh, c)),
        (lambda u: 2 * (torch.sigmoid(u) - 0.5), lambda c: scaled(sigmoid, 2 * c, shift=-c)),
    ]


def _clamp(block: Any) -> LogScale | None:
    """exp(clamp f(s)) for the library's clamp functions, told apart by their values; None for a user's own."""
    points = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    for function, make in _clamps():
        if torch.allclose(block.f_clamp(points), function(points), rtol=0, atol=1e-14):
            return LogScale(make(float(block.clamp)))
    return None


class _Clamped(nn.Module):
    """An activation as a module."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.function(x)


@activation.register
def _(module: _Clamped) -> Activation:
    return module.function


class _VolumePreserving(nn.Module):
    """[log scales, shifts] of a GIN coupling of vectors: the mean of all log scales is taken from each."""

    scales: Tensor
    shifts: Tensor
    centred: Tensor

    def __init__(self, network: nn.Module, log_scale: Activation, entries: int) -> None:
        super().__init__()
        one, none = (
            torch.eye(entries, dtype=torch.float64),
            torch.zeros(entries, entries, dtype=torch.float64),
        )
        self.network, self.log_scale = network, _Clamped(log_scale)
        self.register_buffer("scales", torch.cat([one, none], 1))
        self.register_buffer("shifts", torch.cat([none, one], 1))
        self.register_buffer("centred", one - 1 / entries)

    def forward(
        self, x: Any, context: Any = None
    ) -> Any:  # read by torch.fx, whose proxies are no tensors
        raw = self.network(x) if context is None else self.network(x, context)
        log_scales = functional.linear(
            self.log_scale(functional.linear(raw, self.scales)), self.centred
        )
        return torch.cat([log_scales, functional.linear(raw, self.shifts)], 1)


EXPONENTIAL = Affine(LogScale(known_activation(nn.Identity())), (1, 0))


def _vectors_only(make: Callable[[], BoundedMap]) -> BoundedMap:
    images = NoRule("a volume-preserving (GIN) block of images: a mean over all pixels")
    return maps.ShapeDependent(lambda box: make() if len(box.shape) == 1 else images)


def _context(layer: Any) -> Tensor | None:
    """The conditions side by side, or None."""
    conditions = layer.context
    if conditions is None:
        return None
    tensors = list(conditions) if isinstance(conditions, (list, tuple)) else [conditions]
    return torch.cat(tensors, 1) if tensors else None


def _halves(block: Any) -> ByChannel:
    """The first part of the channels is kept."""
    return ByChannel.halves(block.split_len1 + block.split_len2, block.split_len1)


def _coupling(
    split: ByChannel, network: nn.Module, transformer: Transformer, layer: Any
) -> Coupling:
    rows = torch.arange(transformer.count * len(split.change)).split(len(split.change))
    return Coupling(split, network, transformer, rows, _context(layer))


def _two_sided(
    block: Any, layer: Any, networks: tuple[nn.Module, nn.Module], transformer: Transformer
) -> BoundedMap:
    """First x1 changes by x2, then x2 by the new x1."""
    halves = _halves(block)
    first = _coupling(halves.swapped, networks[0], transformer, layer)
    return Composition((first, _coupling(halves, networks[1], transformer, layer)))


@bounded_map.register
def _(block: Ff.NICECouplingBlock, layer: Any) -> BoundedMap:
    return _two_sided(block, layer, (SideBySide(block.F), SideBySide(block.G)), Additive())


@bounded_map.register
def _(block: Ff.RNVPCouplingBlock, layer: Any) -> BoundedMap:
    scale = _clamp(block)
    if scale is None:
        return NoRule("a clamp activation of the user's own")
    networks = (
        SideBySide(block.subnet_s2, block.subnet_t2),
        SideBySide(block.subnet_s1, block.subnet_t1),
    )
    return _two_sided(block, layer, networks, Affine(scale, (1, 0)))


@bounded_map.register
def _(block: Ff.GLOWCouplingBlock, layer: Any) -> BoundedMap:
    scale = _clamp(block)
    if scale is None:
        return NoRule("a clamp activation of the user's own")
    return _two_sided(
        block, layer, (SideBySide(block.subnet2), SideBySide(block.subnet1)), Affine(scale, (1, 0))
    )


@bounded_map.register
def _(block: Ff.AffineCouplingOneSided, layer: Any) -> BoundedMap:
    scale = _clamp(block)
    if scale is None:
        return NoRule("a clamp activation of the user's own")
    return _coupling(_halves(block), SideBySide(block.subnet), Affine(scale, (1, 0)), layer)


@bounded_map.register
def _(block: Ff.ConditionalAffineTransform, layer: Any) -> BoundedMap:
    scale, context = _clamp(block), _context(layer)
    if scale is None or context is None:
        return NoRule(
            "a conditional transform without its condition, or with a clamp of the user's own"
        )
    with torch.no_grad():
        g = (block.clamp * block.f_clamp(block.subnet(context)[:, : block.channels])).double().exp()
    return flows.KnownConstants(Pair(float(g.max()) * (1 + 1e-13), (1 + 1e-13) / float(g.min())))


@bounded_map.register
def _(block: Ff.GINCouplingBlock, layer: Any) -> BoundedMap:
    scale = _clamp(block)
    if scale is None:
        return NoRule("a clamp activation of the user's own")
    first = _VolumePreserving(SideBySide(block.subnet2), scale.log, block.split_len1)
    second = _VolumePreserving(SideBySide(block.subnet1), scale.log, block.split_len2)
    return _vectors_only(lambda: _two_sided(block, layer, (first, second), EXPONENTIAL))


@bounded_map.register
def _(block: Ff.AllInOneBlock, layer: Any) -> BoundedMap:
    return (
        _vectors_only(lambda: _all_in_one(block, layer)) if block.GIN else _all_in_one(block, layer)
    )


def _all_in_one(block: Ff.AllInOneBlock, layer: Any) -> BoundedMap:
    weight = block._construct_householder_permutation() if block.householder else block.w_perm
    mixing = weight.detach().double().reshape(block.in_channels, block.in_channels)
    split = ByChannel.halves(block.in_channels, block.splits[0])
    tanh = scaled(known_activation(nn.Tanh()), float(block.clamp))
    network: nn.Module = SideBySide(block.subnet, factor=0.1)
    transformer = Affine(LogScale(tanh), (1, 0))
    scale = block.global_scale_activation(block.global_scale).detach().reshape(-1)
    if block.GIN:
        network, transformer = _VolumePreserving(network, tanh, len(split.change)), EXPONENTIAL
        scale = torch.ones_like(scale)
    coupling = _coupling(split, network, transformer, layer)
    parts = [
        coupling,
        maps.Diagonal(scale, block.global_offset.detach().reshape(-1)),
        maps.LinearMap.computed(mixing),
    ]
    before = [maps.LinearMap.computed(mixing.T)] if block.reverse_pre_permute else []
    return Composition((*before, *parts))


@bounded_map.register
def _(block: Ff.PermuteRandom, layer: Any) -> BoundedMap:
    return maps.Rearrangement(lambda x: x[:, block.perm], block.perm.detach().cpu())


@bounded_map.register(Ff.FixedLinearTransform)
def _(block: Any, layer: Any) -> BoundedMap:
    shift = block.b.detach().reshape(-1) if isinstance(block.b, Tensor) else None
    return maps.LinearMap(block.M.detach().T, shift)


@bounded_map.register
def _(block: Ff.Fixed1x1Conv, layer: Any) -> BoundedMap:
    return maps.LinearMap(block.M.detach().squeeze(-1).squeeze(-1))


@bounded_map.register
def _(block: Ff.HouseholderPerm, layer: Any) -> BoundedMap:
    return _by_evaluation(layer)


@bounded_map.register
def _(block: Ff.OrthogonalTransform, layer: Any) -> BoundedMap:
    return _by_evaluation(layer)


def _by_evaluation(layer: Any) -> BoundedMap:
    """The matrix and the shift of an affine map of vectors, read off its values at zero and at the basis."""
    shapes = getattr(layer, "inputs", ())
    if len(shapes) != 1 or len(shapes[0]) != 1:
        return NoRule("an orthogonal transform of images")
    size = shapes[0][0]
    with torch.no_grad():
        like = next(layer.parameters())
        points = torch.cat([like.new_zeros(1, size), torch.eye(size, dtype=like.dtype)])
        values = layer(points).double()
    return maps.LinearMap.computed((values[1:] - values[0]).T, values[0])


@bounded_map.register
def _(block: Ff.InvertibleSigmoid, layer: Any) -> BoundedMap:
    return maps.Elementwise(known_activation(nn.Sigmoid()), inverse=flows.LogitMap(0.0))


@bounded_map.register
def _(block: Ff.ActNorm, layer: Any) -> BoundedMap:
    return maps.Diagonal(
        block.scale.detach().double().exp().reshape(-1), block.bias.detach().reshape(-1)
    )


@bounded_map.register
def _(block: Ff.IResNetLayer, layer: Any) -> BoundedMap:
    return flows.Residual(block.residual)


@bounded_map.register
def _(block: Ff.InvAutoAct, layer: Any) -> BoundedMap:
    slope = block.alpha.detach().double().abs().max().exp()
    bound = float(slope) * (1 + 1e-14)
    return flows.KnownConstants(Pair(bound, bound))


@bounded_map.register
def _(block: Ff.LearnedElementwiseScaling, layer: Any) -> BoundedMap:
    scale = block.s.detach().double().exp()
    return flows.KnownConstants(
        Pair(float(scale.max()) * (1 + 1e-14), (1 + 1e-14) / float(scale.min()))
    )


@bounded_map.register(Ff.Flatten)
@bounded_map.register(Ff.Reshape)
@bounded_map.register(Ff.IRevNetDownsampling)
@bounded_map.register(Ff.IRevNetUpsampling)
def _(block: Any, layer: Any) -> BoundedMap:
    return maps.Rearrangement(lambda x: layer(x))


@bounded_map.register
def _(block: Ff.HaarDownsampling, layer: Any) -> BoundedMap:
    rebalance = 2.0 * block.fac_fwd

    def after(shape: torch.Size) -> torch.Size:
        return torch.Size([shape[0] * 4, shape[1] // 2, shape[2] // 2])

    return flows.KnownConstants(_similarity(rebalance), shape_of=after)


@bounded_map.register
def _(block: Ff.HaarUpsampling, layer: Any) -> BoundedMap:
    def after(shape: torch.Size) -> torch.Size:
        return torch.Size([shape[0] // 4, shape[1] * 2, shape[2] * 2])

    return flows.KnownConstants(_similarity(2.0 * block.fac_rev), shape_of=after)


def _similarity(factor: float) -> Pair:
    roomy = 1 + 4 * math.ulp(1.0)
    return Pair(factor * roomy, roomy / factor)
