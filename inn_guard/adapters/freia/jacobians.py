"""FrEIA: tangents of permutations, of one-sided and of two-sided coupling blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from FrEIA import modules
from torch import Tensor, nn
from torch.nn import functional

from inn_guard.adapters.structured_jacobians import (
    PermutedOutputs,
    ChainJacobian,
    coupling_jacobian,
    known_jacobian,
    permutation_jacobian,
)
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import AutogradNetwork, NetworkJacobian, linearize_network
from inn_guard.layers.coupling import CouplingJacobian
from inn_guard.layers.linear import ChannelMixingJacobian, ElementwiseJacobian
from inn_guard.layers.partition import Leading


@known_jacobian.register
def _(module: modules.PermuteRandom, x: Tensor, context: Any) -> LayerJacobian | None:
    order, back, dims = module.perm, module.perm_inv, x.dim()
    return permutation_jacobian(
        x,
        lambda v: v.index_select(v.dim() + 1 - dims, order),
        lambda v: v.index_select(v.dim() + 1 - dims, back),
    )


@known_jacobian.register
def _(module: modules.AllInOneBlock, x: Tensor, context: Any) -> LayerJacobian | None:
    if module.GIN or module.reverse_pre_permute or module.householder or x.dim() not in (2, 4):
        return None
    partition = Leading(module.splits[0])
    kept = x[:, : module.splits[0]]
    network = PermutedOutputs(_network(module.subnet, kept, context), factor=0.1)
    coupling = coupling_jacobian(
        x, network, partition, lambda h: (module.clamp * (0.1 * h).tanh()).exp()
    )
    scale = module.global_scale_activation(module.global_scale).detach()
    scaled = ElementwiseJacobian(coupling.output * scale + module.global_offset.detach(), scale)
    W = module.w_perm.detach().flatten(1)
    inverse = torch.linalg.inv(W)
    mixed = ChannelMixingJacobian(
        output=_mix(scaled.output, W, x.dim()),
        jvp=lambda v: _mix(v, W, x.dim()),
        vjp=lambda u: _mix(u, W.T, x.dim()),
        inverse_jvp=lambda u: _mix(u, inverse, x.dim()),
        inverse_vjp=lambda v: _mix(v, inverse.T, x.dim()),
        shape=x.shape,
        weight=W,
    )
    return ChainJacobian([coupling, scaled, mixed])


@known_jacobian.register
def _(module: modules.GLOWCouplingBlock, x: Tensor, context: Any) -> LayerJacobian | None:
    def affine(x: Tensor, kept: Tensor, subnet: nn.Module, *, swapped: bool) -> CouplingJacobian:
        network = PermutedOutputs(_network(subnet, kept, context))
        return coupling_jacobian(
            x, network, Leading(module.split_len1, swapped=swapped), _scale_of(module)
        )

    return _two_sided(x, module.split_len1, affine, (module.subnet2, module.subnet1))


@known_jacobian.register
def _(module: modules.RNVPCouplingBlock, x: Tensor, context: Any) -> LayerJacobian | None:
    def affine(x: Tensor, kept: Tensor, subnets: Any, *, swapped: bool) -> CouplingJacobian:
        shift, h = subnets
        network = AutogradNetwork(
            lambda k: torch.cat([_at(shift, k, context), _at(h, k, context)], 1), kept
        )
        return coupling_jacobian(
            x, network, Leading(module.split_len1, swapped=swapped), _scale_of(module)
        )

    pairs = (module.subnet_t2, module.subnet_s2), (module.subnet_t1, module.subnet_s1)
    return _two_sided(x, module.split_len1, affine, pairs)


@known_jacobian.register
def _(module: modules.NICECouplingBlock, x: Tensor, context: Any) -> LayerJacobian | None:
    def additive(x: Tensor, kept: Tensor, subnet: nn.Module, *, swapped: bool) -> CouplingJacobian:
        partition = Leading(module.split_len1, swapped=swapped)
        return coupling_jacobian(x, _network(subnet, kept, context), partition, None)

    return _two_sided(x, module.split_len1, additive, (module.F, module.G))


def _two_sided(
    x: Tensor, count: int, half: Callable[..., CouplingJacobian], subnets: tuple[Any, Any]
) -> ChainJacobian:
    """The first ``count`` channels are changed given the others, then the others given these."""
    first = half(x, x[:, count:], subnets[0], swapped=True)
    return ChainJacobian(
        [first, half(first.output, first.output[:, :count], subnets[1], swapped=False)]
    )


def _scale_of(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda h: (module.clamp * module.f_clamp(h)).exp()


def _network(subnet: nn.Module, kept: Tensor, context: Any) -> NetworkJacobian:
    if context is None or len(context) == 0:
        return linearize_network(subnet, kept)
    return AutogradNetwork(lambda k: _at(subnet, k, context), kept)


def _at(subnet: nn.Module, kept: Tensor, context: Any) -> Tensor:
    conditions = (
        [] if context is None else context if isinstance(context, (list, tuple)) else [context]
    )
    return subnet(torch.cat([kept, *conditions], 1))


def _mix(v: Tensor, weight: Tensor, dims: int) -> Tensor:
    return functional.linear(v.movedim(1 - dims, -1), weight).movedim(-1, 1 - dims)
