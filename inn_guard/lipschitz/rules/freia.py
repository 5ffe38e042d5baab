"""The bound rules of FrEIA, with its own clamps."""

# The name of a rule says what it is: bound_<block>.
# ruff: noqa: D103

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import FrEIA.modules as Ff
import torch
from torch import Tensor, nn
from torch.nn import functional

from inn_guard.lipschitz.maps import closed_forms
from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.composition import Composition
from inn_guard.lipschitz.maps.coupling import ByChannel, Coupling, blocked_rows
from inn_guard.lipschitz.maps.residual import Residual
from inn_guard.lipschitz.networks.activations import (
    Activation,
    activation,
    atan_activation,
    known_activation,
    scaled,
)
from inn_guard.lipschitz.networks.conditioner import analyse, trace_network
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.rules.blocks import OWN_INPUT, SideBySide, returns_input
from inn_guard.lipschitz.transformers.affine import (
    EXPONENTIAL,
    Additive,
    Affine,
    LogScale,
)
from inn_guard.lipschitz.transformers.base import Transformer
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper

FOREIGN_CLAMP = "a clamp activation of the user's own"
ROUNDINGS = 100  #: more than in the exponential of a stored number


def _clamps() -> list[tuple[Callable[[Tensor], Tensor], Callable[[float], Activation]]]:
    sigmoid, tanh = known_activation(nn.Sigmoid()), known_activation(nn.Tanh())
    return [
        (lambda u: 0.636 * torch.atan(u), lambda c: atan_activation(0.636 * c)),
        (torch.tanh, lambda c: scaled(tanh, c)),
        (lambda u: 2 * (torch.sigmoid(u) - 0.5), lambda c: scaled(sigmoid, 2 * c, shift=-c)),
    ]


def _clamp(block: Any) -> LogScale | None:
    """exp(clamp f(s)) for the library's clamp functions, recognised by value; else None."""
    # the library's own are torch.tanh and functions without a name
    module = getattr(block.f_clamp, "__module__", None) or ""
    if block.f_clamp is not torch.tanh and not module.startswith("FrEIA."):
        return None
    points = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    for function, make in _clamps():
        if torch.allclose(block.f_clamp(points), function(points), rtol=0, atol=1e-14):
            return LogScale(make(float(block.clamp)))
    return None


class _Clamped(nn.Module):
    """A clamp as a module."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.function(x)


@activation.register
def enclose_clamp(module: _Clamped) -> Activation:
    return module.function


class _VolumePreserving(nn.Module):
    """[log scales, shifts] of a GIN coupling of vectors; the log scales have mean zero."""

    scales: Tensor
    shifts: Tensor
    centred: Tensor

    def __init__(self, network: nn.Module, log_scale: Activation, entries: int) -> None:
        super().__init__()
        one = torch.eye(entries, dtype=torch.float64)
        none = torch.zeros_like(one)
        self.network, self.log_scale = network, _Clamped(log_scale)
        self.register_buffer("scales", torch.cat([one, none], 1))
        self.register_buffer("shifts", torch.cat([none, one], 1))
        self.register_buffer("centred", one - 1 / entries)

    # called by torch.fx, whose proxies are no tensors
    def forward(self, x: Any, context: Any = None) -> Any:
        arguments = [x]
        if context is not None:
            arguments.append(context)
        raw = self.network(*arguments)
        clamped = self.log_scale(functional.linear(raw, self.scales))
        log_scales = functional.linear(clamped, self.centred)
        return torch.cat([log_scales, functional.linear(raw, self.shifts)], 1)


def _vectors_only(make: Callable[[], BoundedMap]) -> BoundedMap:
    def made(box: Interval) -> BoundedMap:
        if len(box.shape) == 1:
            return make()
        return NoRule("a volume-preserving (GIN) block of images: a mean over all pixels")

    return maps.ShapeDependent(made)


def _context(layer: Any) -> Tensor | None:
    """The conditions joined, or None."""
    conditions = layer.context
    if not isinstance(conditions, (list, tuple)):
        return conditions
    if not conditions:
        return None
    return torch.cat(list(conditions), 1)


def _halves(block: Any) -> ByChannel:
    """The first part of the channels is kept."""
    return ByChannel.halves(block.split_len1 + block.split_len2, block.split_len1)


def _coupling(
    split: ByChannel, network: nn.Module, transformer: Transformer, layer: Any
) -> Coupling:
    rows = blocked_rows(len(split.change), transformer.count)
    return Coupling(split, network, transformer, rows, _context(layer))


def _two_sided(
    block: Any, layer: Any, networks: tuple[nn.Module, nn.Module], transformer: Transformer
) -> BoundedMap:
    """First x1 changes by x2, then x2 by the new x1."""
    halves = _halves(block)
    first = _coupling(halves.swapped, networks[0], transformer, layer)
    return Composition((first, _coupling(halves, networks[1], transformer, layer)))


@bounded_map.register
def bound_nice_coupling(block: Ff.NICECouplingBlock, layer: Any) -> BoundedMap:
    return _two_sided(block, layer, (SideBySide(block.F), SideBySide(block.G)), Additive())


@bounded_map.register
def bound_rnvp_coupling(block: Ff.RNVPCouplingBlock, layer: Any) -> BoundedMap:
    scale = _clamp(block)
    if scale is None:
        return NoRule(FOREIGN_CLAMP)
    networks = (
        SideBySide(block.subnet_s2, block.subnet_t2),
        SideBySide(block.subnet_s1, block.subnet_t1),
    )
    return _two_sided(block, layer, networks, Affine(scale, (1, 0)))


@bounded_map.register
def bound_glow_coupling(block: Ff.GLOWCouplingBlock, layer: Any) -> BoundedMap:
    scale = _clamp(block)
    if scale is None:
        return NoRule(FOREIGN_CLAMP)
    return _two_sided(
        block, layer, (SideBySide(block.subnet2), SideBySide(block.subnet1)), Affine(scale, (1, 0))
    )


@bounded_map.register
def bound_one_sided_coupling(block: Ff.AffineCouplingOneSided, layer: Any) -> BoundedMap:
    scale = _clamp(block)
    if scale is None:
        return NoRule(FOREIGN_CLAMP)
    return _coupling(_halves(block), SideBySide(block.subnet), Affine(scale, (1, 0)), layer)


@bounded_map.register
def bound_conditional_affine(block: Ff.ConditionalAffineTransform, layer: Any) -> BoundedMap:
    scale, context = _clamp(block), _context(layer)
    if scale is None or context is None:
        return NoRule(
            "a conditional transform without its condition, or with a clamp of the user's own"
        )
    network, pair = trace_network(block.subnet), Pair(0.0, 0.0)
    try:
        for condition in context:
            raw = analyse(network, Interval.of(condition)).output
            own = closed_forms.elementwise(scale.value(raw[: block.channels]))
            pair = Pair(*map(Upper.max, pair, own))
    except Unbounded as error:
        return NoRule(str(error))
    return maps.KnownConstants(pair)


@bounded_map.register
def bound_gin_coupling(block: Ff.GINCouplingBlock, layer: Any) -> BoundedMap:
    scale = _clamp(block)
    if scale is None:
        return NoRule(FOREIGN_CLAMP)
    first = _VolumePreserving(SideBySide(block.subnet2), scale.log, block.split_len1)
    second = _VolumePreserving(SideBySide(block.subnet1), scale.log, block.split_len2)
    affine = Affine(EXPONENTIAL, (1, 0))
    return _vectors_only(lambda: _two_sided(block, layer, (first, second), affine))


@bounded_map.register
def bound_all_in_one(block: Ff.AllInOneBlock, layer: Any) -> BoundedMap:
    if not block.conditional and returns_input(block.subnet):
        return NoRule(OWN_INPUT)
    if block.GIN:
        return _vectors_only(lambda: _all_in_one(block, layer))
    return _all_in_one(block, layer)


def _all_in_one(block: Ff.AllInOneBlock, layer: Any) -> BoundedMap:
    weight = block.w_perm
    if block.householder:
        weight = block._construct_householder_permutation()
    shape = (block.in_channels, block.in_channels)
    mixing = weight.detach().double().reshape(shape)
    split = ByChannel.halves(block.in_channels, block.splits[0])
    tanh = scaled(known_activation(nn.Tanh()), float(block.clamp))
    network: nn.Module = SideBySide(block.subnet, factor=0.1)
    transformer = Affine(LogScale(tanh), (1, 0))
    scale = block.global_scale_activation(block.global_scale).detach().reshape(-1)
    if block.GIN:
        network = _VolumePreserving(network, tanh, len(split.change))
        transformer = Affine(EXPONENTIAL, (1, 0))
        scale = torch.ones_like(scale)
    coupling = _coupling(split, network, transformer, layer)
    parts: list[BoundedMap] = [
        coupling,
        maps.Diagonal(scale, block.global_offset.detach().reshape(-1)),
        maps.LinearMap.computed(mixing),
    ]
    if block.reverse_pre_permute:
        before = mixing.T
        if not block.householder:
            before = block.w_perm_inv.detach().reshape(shape)
        parts = [maps.LinearMap.computed(before), *parts]
    return Composition(tuple(parts))


@bounded_map.register
def bound_permute_random(block: Ff.PermuteRandom, layer: Any) -> BoundedMap:
    return maps.Rearrangement(lambda x: x[:, block.perm], block.perm.detach().cpu())


@bounded_map.register(Ff.FixedLinearTransform)
def bound_fixed_linear(block: Any, layer: Any) -> BoundedMap:
    shift = None
    if isinstance(block.b, Tensor):
        shift = block.b.detach().reshape(-1)
    return maps.LinearMap(block.M.detach().T, shift)


@bounded_map.register
def bound_fixed_1x1_convolution(block: Ff.Fixed1x1Conv, layer: Any) -> BoundedMap:
    return maps.LinearMap(block.M.detach().squeeze(-1).squeeze(-1))


@bounded_map.register(Ff.HouseholderPerm)
@bounded_map.register(Ff.OrthogonalTransform)
def bound_orthogonal(block: Any, layer: Any) -> BoundedMap:
    """An affine map of vectors, from its values at zero and at the basis."""
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
def bound_sigmoid(block: Ff.InvertibleSigmoid, layer: Any) -> BoundedMap:
    return maps.Elementwise(known_activation(nn.Sigmoid()), inverse=maps.LogitMap(0.0))


@bounded_map.register
def bound_actnorm(block: Ff.ActNorm, layer: Any) -> BoundedMap:
    if block.init_on_next_batch:
        return NoRule("ActNorm will be initialised by its next batch; call the model on data first")
    return maps.Diagonal(
        block.scale.detach().double().exp().reshape(-1), block.bias.detach().reshape(-1)
    )


@bounded_map.register
def bound_residual(block: Ff.IResNetLayer, layer: Any) -> BoundedMap:
    return Residual(block.residual)


@bounded_map.register(Ff.InvAutoAct)
@bounded_map.register(Ff.InvAutoActFixed)
def bound_automatic_activation(block: Any, layer: Any) -> BoundedMap:
    slope = Upper.computed(float(block.alpha.detach().double().abs().max().exp()), ROUNDINGS)
    return maps.KnownConstants(Pair(slope, slope))


@bounded_map.register
def bound_elementwise_scaling(block: Ff.LearnedElementwiseScaling, layer: Any) -> BoundedMap:
    return _known_scale(block.s.detach().double().exp())


def _known_scale(scale: Tensor) -> BoundedMap:
    """A diagonal map of scales that were computed with some roundings."""
    one = Upper.computed(1.0, ROUNDINGS)
    return maps.KnownConstants(Pair(float(scale.max()) * one, one / float(scale.min())))


@bounded_map.register(Ff.Flatten)
@bounded_map.register(Ff.Reshape)
@bounded_map.register(Ff.IRevNetDownsampling)
@bounded_map.register(Ff.IRevNetUpsampling)
def bound_rearrangement(block: Any, layer: Any) -> BoundedMap:
    return maps.Rearrangement(lambda x: layer(x))


def _is_haar(block: Any) -> bool:
    """Whether the four filters of every channel are orthogonal, and of ones."""
    filters = block.haar_weights.detach().double().flatten(1).unflatten(0, (-1, 4))
    return torch.equal(filters @ filters.mT, 4 * torch.eye(4).to(filters).expand_as(filters))


@bounded_map.register
def bound_haar_downsampling(block: Ff.HaarDownsampling, layer: Any) -> BoundedMap:
    def after(shape: torch.Size) -> torch.Size:
        return torch.Size([shape[0] * 4, shape[1] // 2, shape[2] // 2])

    if not _is_haar(block):
        return NoRule("a Haar transform with other filters")
    return maps.KnownConstants(_similarity(2.0 * block.fac_fwd), shape_of=after)


@bounded_map.register
def bound_haar_upsampling(block: Ff.HaarUpsampling, layer: Any) -> BoundedMap:
    def after(shape: torch.Size) -> torch.Size:
        return torch.Size([shape[0] // 4, shape[1] * 2, shape[2] * 2])

    if not _is_haar(block):
        return NoRule("a Haar transform with other filters")
    return maps.KnownConstants(_similarity(2.0 * block.fac_rev), shape_of=after)


def _similarity(factor: float) -> Pair:
    one = Upper.computed(1.0, 8)
    return Pair(factor * one, one / factor)
