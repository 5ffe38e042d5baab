"""FrEIA: Jacobians of permutations, of one-sided and of two-sided coupling blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from FrEIA import modules
from torch import Tensor, nn

from inn_guard.adapters.structured_jacobians import (
    ChainJacobian,
    PermutedOutputs,
    coupling_jacobian,
    known_jacobian,
    permutation_jacobian,
)
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import NetworkJacobian, linearize_network
from inn_guard.jacobian.recorded import recorded_network
from inn_guard.layers.coupling import CouplingJacobian
from inn_guard.layers.linear import ChannelMixingJacobian, ElementwiseJacobian
from inn_guard.layers.partition import Leading

#: (x, identity part, subnetwork(s), partition) -> the Jacobian of one of the two steps of a block
HalfStep = Callable[[Tensor, Tensor, Any, Leading], CouplingJacobian]


@known_jacobian.register
def _permutation(module: modules.PermuteRandom, x: Tensor, context: Any) -> LayerJacobian:
    return permutation_jacobian(x, module.perm, back=module.perm_inv)


@known_jacobian.register
def _all_in_one(module: modules.AllInOneBlock, x: Tensor, context: Any) -> LayerJacobian | None:
    """One affine coupling, then a scale and an offset per channel, then a matrix over channels."""
    if module.GIN or module.reverse_pre_permute or module.householder or x.dim() not in (2, 4):
        return None
    identity = x[:, : module.splits[0]]
    # the block multiplies its network's output by 0.1, the shift here and the scale below
    network = PermutedOutputs(_linearized(module.subnet, identity, context), factor=0.1)

    def soft_clamp(h: Tensor) -> Tensor:
        return (module.clamp * (0.1 * h).tanh()).exp()

    coupled = coupling_jacobian(x, network, Leading(module.splits[0]), soft_clamp)
    scale = module.global_scale_activation(module.global_scale).detach()
    shifted = coupled.output * scale + module.global_offset.detach()
    scaled = ElementwiseJacobian(shifted, scale)
    weight = module.w_perm.detach().flatten(1)
    inverse = torch.linalg.inv(weight)
    mixed = ChannelMixingJacobian.of_weight(scaled.output, weight, inverse=inverse)
    return ChainJacobian([coupled, scaled, mixed])


@known_jacobian.register
def _glow(module: modules.GLOWCouplingBlock, x: Tensor, context: Any) -> LayerJacobian | None:
    """Two affine couplings, each with one network for scale and shift."""

    def half(x: Tensor, identity: Tensor, subnet: Any, partition: Leading) -> CouplingJacobian:
        network = PermutedOutputs(_linearized(subnet, identity, context))
        return coupling_jacobian(x, network, partition, _scale_of(module))

    return _two_sided(x, module.split_len1, half, (module.subnet2, module.subnet1))


@known_jacobian.register
def _real_nvp(module: modules.RNVPCouplingBlock, x: Tensor, context: Any) -> LayerJacobian | None:
    """Two affine couplings, each with one network for the scale and one for the shift."""

    def half(x: Tensor, identity: Tensor, subnets: Any, partition: Leading) -> CouplingJacobian:
        shift, h = subnets

        def shift_and_scale(k: Tensor) -> Tensor:
            return torch.cat([_at(shift, k, context), _at(h, k, context)], 1)

        network = recorded_network(shift_and_scale, identity, module=module)
        return coupling_jacobian(x, network, partition, _scale_of(module))

    first = (module.subnet_t2, module.subnet_s2)
    second = (module.subnet_t1, module.subnet_s1)
    return _two_sided(x, module.split_len1, half, (first, second))


@known_jacobian.register
def _nice(module: modules.NICECouplingBlock, x: Tensor, context: Any) -> LayerJacobian | None:
    """Two additive couplings."""

    def half(x: Tensor, identity: Tensor, subnet: Any, partition: Leading) -> CouplingJacobian:
        return coupling_jacobian(x, _linearized(subnet, identity, context), partition, None)

    return _two_sided(x, module.split_len1, half, (module.F, module.G))


def _two_sided(x: Tensor, count: int, half: HalfStep, subnets: tuple[Any, Any]) -> ChainJacobian:
    """The first ``count`` channels are transformed given the others, then the reverse."""
    first = half(x, x[:, count:], subnets[0], Leading(count, swapped=True))
    second = half(first.output, first.output[:, :count], subnets[1], Leading(count))
    return ChainJacobian([first, second])


def _scale_of(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda h: (module.clamp * module.f_clamp(h)).exp()


def _linearized(subnet: nn.Module, identity: Tensor, context: Any) -> NetworkJacobian:
    """The Jacobian of a subnetwork with respect to the identity part."""
    if context is None or len(context) == 0:
        return linearize_network(subnet, identity)
    return recorded_network(lambda k: _at(subnet, k, context), identity, module=subnet)


def _at(subnet: nn.Module, identity: Tensor, context: Any) -> Tensor:
    """The subnetwork's output at the identity part and all conditions."""
    conditions: list[Tensor] = []
    if isinstance(context, (list, tuple)):
        conditions = list(context)
    elif context is not None:
        conditions = [context]
    return subnet(torch.cat([identity, *conditions], 1))
