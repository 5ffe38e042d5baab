"""MemCNN: Jacobians of its two-sided couplings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from memcnn import AdditiveCoupling, AffineCoupling, InvertibleModuleWrapper
from torch import Tensor, nn

from inn_guard.adapters.structured_jacobians import (
    ChainJacobian,
    coupling_jacobian,
    known_jacobian,
)
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import linearize_network
from inn_guard.jacobian.recorded import recorded_network
from inn_guard.layers.coupling import CouplingJacobian
from inn_guard.layers.partition import Halves

#: (x, network, partition) -> the Jacobian of one of the two steps of a coupling
HalfStep = Callable[[Tensor, nn.Module, Halves], CouplingJacobian]


@known_jacobian.register
def _wrapper(module: InvertibleModuleWrapper, x: Tensor, context: Any) -> LayerJacobian | None:
    return known_jacobian(module._fn, x, context)


@known_jacobian.register
def _additive(module: AdditiveCoupling, x: Tensor, context: Any) -> LayerJacobian | None:
    """z1 = x1 + Fm(x2), z2 = x2 + Gm(z1)."""

    def half(x: Tensor, network: nn.Module, partition: Halves) -> CouplingJacobian:
        identity, _ = partition.split(x, dims=x.dim())
        return coupling_jacobian(x, linearize_network(network, identity), partition, None)

    return _two_sided(half, module, x)


@known_jacobian.register
def _affine(module: AffineCoupling, x: Tensor, context: Any) -> LayerJacobian | None:
    """z1 = x1 * s + t with (s, t) = Fm(x2), and z2 = x2 * s + t with (s, t) = Gm(z1)."""

    def half(x: Tensor, network: nn.Module, partition: Halves) -> CouplingJacobian:
        identity, _ = partition.split(x, dims=x.dim())

        def shift_and_scale(identity: Tensor) -> Tensor:
            scale, shift = network(identity)
            return torch.cat([shift, scale], 1)

        both = recorded_network(shift_and_scale, identity, module=network)
        return coupling_jacobian(x, both, partition, lambda scale: scale)

    return _two_sided(half, module, x)


def _two_sided(half: HalfStep, module: Any, x: Tensor) -> LayerJacobian | None:
    """The first half is transformed given the second, then the second given the new first."""
    # a wrapper inside would free the storage of its input
    holds_wrappers = any(isinstance(part, InvertibleModuleWrapper) for part in module.modules())
    if module.split_dim != 1 or holds_wrappers:
        return None
    first = half(x, module.Fm, Halves(swapped=True))
    second = half(first.output, module.Gm, Halves())
    return ChainJacobian([first, second])
