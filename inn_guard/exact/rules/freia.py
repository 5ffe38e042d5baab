"""Rules of FrEIA."""

from __future__ import annotations

from typing import Any

import torch
from FrEIA import modules
from torch import Tensor, nn

from inn_guard.adapters.freia.graph import OnEdges
from inn_guard.core.tensors import concatenate_flat
from inn_guard.exact.fixed_point import NoExactRule
from inn_guard.exact.rules import families, register, steps_of
from inn_guard.exact.steps import (
    Affine,
    Matrix,
    Moves,
    OnTail,
    Parameters,
    Step,
    StoredInput,
)

register(
    "permutation",
    modules.PermuteRandom,
    modules.Flatten,
    modules.Reshape,
    modules.IRevNetDownsampling,
    modules.IRevNetUpsampling,
    modules.Split,
    modules.Concat,
)(families.moves)
register(
    "matrix",
    modules.Fixed1x1Conv,
    modules.FixedLinearTransform,
    modules.HouseholderPerm,
    modules.OrthogonalTransform,
)(families.matrix)
register(
    "elementwise affine",
    modules.ActNorm,
    modules.LearnedElementwiseScaling,
    modules.ConditionalAffineTransform,
)(families.elementwise_affine)


@register("two additive couplings", modules.NICECouplingBlock)
def exact_nice(layer: Any, x: Tensor) -> list[Step]:
    """Each half shifted in turn."""
    module = layer.module
    return _two_sided(layer, x, lambda u: (None, module.F(u)), lambda u: (None, module.G(u)))


@register("two affine couplings", modules.RNVPCouplingBlock)
def exact_real_nvp(layer: Any, x: Tensor) -> list[Step]:
    """Each half scaled and shifted in turn, by a network for each."""
    module = layer.module

    def at(scale: nn.Module, shift: nn.Module) -> Parameters:
        return lambda u: (_clamped(module, scale(u)).exp(), shift(u))

    first = at(module.subnet_s2, module.subnet_t2)
    return _two_sided(layer, x, first, at(module.subnet_s1, module.subnet_t1))


@register("two affine couplings", modules.GLOWCouplingBlock, modules.GINCouplingBlock)
def exact_glow(layer: Any, x: Tensor) -> list[Step]:
    """Each half scaled and shifted in turn, by one network for both."""
    module = layer.module
    first = _from_one_network(module, module.subnet2, module.split_len1)
    return _two_sided(layer, x, first, _from_one_network(module, module.subnet1, module.split_len2))


@register("affine coupling", modules.AffineCouplingOneSided)
def exact_one_sided(layer: Any, x: Tensor) -> list[Step]:
    """The second part scaled and shifted."""
    module = layer.module
    parameters = _from_one_network(module, module.subnet, module.split_len2)
    return [_half(layer, x, parameters, range(module.split_len1), module.channels)]


@register("affine coupling and matrix", modules.AllInOneBlock)
def exact_all_in_one(layer: Any, x: Tensor) -> list[Step]:
    """A coupling, an affine map of all channels, and a permutation or rotation."""
    module = layer.module
    channels, (first, second) = module.in_channels, module.splits

    def parameters(identity: Tensor) -> tuple[Tensor, Tensor]:
        raw = module.subnet(identity) * 0.1
        log_scale = module.clamp * torch.tanh(raw[:, :second])
        if module.GIN:
            log_scale = log_scale - log_scale.mean(dim=module.sum_dims, keepdim=True)
        return log_scale.exp(), raw[:, second:]

    weight = module.w_perm
    if module.householder:
        weight = module._construct_householder_permutation()
    mixing = Matrix(weight.detach().flatten(1), None, dtype=x.dtype)
    scale = None
    if not module.GIN:
        scale = module.global_scale_activation(module.global_scale).detach().expand_as(x)
    shift = module.global_offset.detach().expand_as(x)
    steps: list[Step] = [
        _half(layer, x, parameters, range(first), channels),
        Affine(lambda known: (scale, shift), None, dtype=x.dtype),
        mixing,
    ]
    if not module.reverse_pre_permute:
        return steps
    return [mixing.inverted(), *steps]


@register("on edges of a graph", OnEdges)
def exact_on_edges(layer: Any, x: Tensor) -> list[Step]:
    """The touched edges are moved to the end, where the inner layer's steps act on them."""
    outputs = layer.outputs
    z_shape = outputs[0] if len(outputs) == 1 else (x[0].numel(),)
    z = x.new_zeros(len(x), *z_shape)
    touched, result = layer.before.split(x)[0], layer.after.split(z)[0]
    try:
        steps = steps_of(layer.inner, touched)
    except NoExactRule:
        steps = [StoredInput(layer.inner, dtype=x.dtype)]
    on_tail = OnTail(steps, touched.shape[1:], result.shape[1:], dtype=x.dtype)
    together = Moves.of(lambda values: _touched_last(layer.before, values), x)
    apart = Moves.of(lambda values: _touched_last(layer.after, values), z).inverted()
    return [together, on_tail, apart]


def _touched_last(edges: Any, values: Tensor) -> Tensor:
    touched, alive = edges.split(values)
    # in an order that is the same before and after the layer
    others = [alive[edge] for edge in sorted(alive) if edge not in edges.touched]
    return concatenate_flat([*others, touched])


def _two_sided(layer: Any, x: Tensor, first: Parameters, second: Parameters) -> list[Step]:
    """The first channels are transformed given the others, then the reverse."""
    count, channels = layer.module.split_len1, layer.module.channels
    return [
        _half(layer, x, first, range(count, channels), channels),
        _half(layer, x, second, range(count), channels),
    ]


def _half(layer: Any, x: Tensor, parameters: Parameters, identity: range, channels: int) -> Affine:
    """A coupling whose parameters are functions of these channels and of the conditions."""
    conditions = layer._conditions()
    changed = [channel for channel in range(channels) if channel not in identity]
    if not changed:
        raise NoExactRule("one of its parts is empty")

    def at(known: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return parameters(torch.cat([known, *conditions], 1))

    def on(indices: Any) -> Tensor:
        return torch.tensor(list(indices), dtype=torch.long, device=x.device)

    return families.coupling(x, on(identity), on(changed), at)


def _from_one_network(module: Any, network: nn.Module, count: int) -> Parameters:
    def parameters(u: Tensor) -> tuple[Tensor, Tensor]:
        raw = network(u)
        return _clamped(module, raw[:, :count]).exp(), raw[:, count:]

    return parameters


def _clamped(module: Any, h: Tensor) -> Tensor:
    """The logarithm of the scale."""
    log_scale = module.clamp * module.f_clamp(h)
    if isinstance(module, modules.GINCouplingBlock):
        return log_scale - log_scale.mean(1, keepdim=True)
    return log_scale
