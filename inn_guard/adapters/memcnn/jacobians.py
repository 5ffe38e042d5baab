"""MemCNN: tangents of its two-sided couplings."""

from __future__ import annotations

from typing import Any

import torch
from memcnn import AdditiveCoupling, AffineCoupling, InvertibleModuleWrapper
from torch import Tensor, nn

from inn_guard.adapters.structured_jacobians import ChainJacobian, coupling_jacobian, known_jacobian
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import AutogradNetwork, linearize_network
from inn_guard.layers.coupling import CouplingJacobian
from inn_guard.layers.partition import Halves


@known_jacobian.register
def _(module: InvertibleModuleWrapper, x: Tensor, context: Any) -> LayerJacobian | None:
    return known_jacobian(module._fn, x, context)


@known_jacobian.register
def _(module: AdditiveCoupling, x: Tensor, context: Any) -> LayerJacobian | None:
    def additive(x: Tensor, network: nn.Module, *, swapped: bool) -> CouplingJacobian:
        partition = Halves(swapped=swapped)
        kept = partition.split(x, dims=x.dim())[0]
        return coupling_jacobian(x, linearize_network(network, kept), partition, None)

    return None if _special(module, x) else _two_sided(additive, module, x)


@known_jacobian.register
def _(module: AffineCoupling, x: Tensor, context: Any) -> LayerJacobian | None:
    def affine(x: Tensor, network: nn.Module, *, swapped: bool) -> CouplingJacobian:
        partition = Halves(swapped=swapped)
        kept = partition.split(x, dims=x.dim())[0]
        both = AutogradNetwork(lambda k: torch.cat(network(k)[::-1], 1), kept)
        return coupling_jacobian(x, both, partition, lambda scale: scale)

    return None if _special(module, x) else _two_sided(affine, module, x)


def _two_sided(half: Any, module: Any, x: Tensor) -> ChainJacobian:
    """The first half is changed given the second, then the second given the new first."""
    first = half(x, module.Fm, swapped=True)
    return ChainJacobian([first, half(first.output, module.Gm, swapped=False)])


def _special(module: Any, x: Tensor) -> bool:
    """Whether there is more to it than one evaluation of each network: wrappers inside, or another split."""
    return module.split_dim != 1 or any(
        isinstance(part, InvertibleModuleWrapper) for part in module.modules()
    )
