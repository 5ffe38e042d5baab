"""zuko: Jacobians of its couplings, its linear maps and its permutations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import zuko.nn
from torch import Tensor
from zuko import transforms
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.lazy import UnconditionalTransform
from zuko.utils import unpack

from inn_guard.adapters.structured_jacobians import (
    Features,
    channel_mixing_jacobian,
    elementwise_coupling_jacobian,
    entrywise_jacobian,
    known_jacobian,
    permutation_jacobian,
)
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import (
    AutogradNetwork,
    InputSliceJacobian,
    LinearJacobian,
    NetworkJacobian,
    linearize_module,
    linearize_network,
)


@linearize_module.register
def _linearize_linear(module: zuko.nn.Linear, x: Tensor) -> NetworkJacobian:
    # zuko's Linear may hold a stack of matrices
    if module.weight.dim() == 2:
        return LinearJacobian(module, x)  # type: ignore[arg-type]
    return AutogradNetwork(module, x)


@known_jacobian.register
def _coupling(module: GeneralCouplingTransform, x: Tensor, context: Any) -> LayerJacobian | None:
    """A coupling with any univariate map: affine, additive, a spline."""
    if x.dim() != 2:
        return None
    partition = Features(module.mask.nonzero().squeeze(-1), (~module.mask).nonzero().squeeze(-1))
    identity, _ = partition.split(x, dims=2)
    network = _linearized(module.hyper, identity, context)
    return elementwise_coupling_jacobian(x, network, partition, _univariate(module))


@known_jacobian.register
def _autoregressive(
    module: MaskedAutoregressiveTransform, x: Tensor, context: Any
) -> LayerJacobian | None:
    """Every feature goes through a univariate map whose parameters depend on earlier features."""
    if x.dim() != 2:
        return None
    network = _linearized(module.hyper, x, context)
    return entrywise_jacobian(x, network, _univariate(module), passes=module.passes)


@known_jacobian.register
def _unconditional(module: UnconditionalTransform, x: Tensor, context: Any) -> LayerJacobian | None:
    """A permutation, a rotation or an LU-factorised matrix of the features."""
    transform = module(context)
    if x.dim() != 2:
        return None
    if isinstance(transform, transforms.PermutationTransform):
        return permutation_jacobian(x, transform.order)
    if isinstance(transform, transforms.RotationTransform):
        return channel_mixing_jacobian(x, transform.R.detach())
    if isinstance(transform, transforms.LULinearTransform):
        return channel_mixing_jacobian(x, (transform.L @ transform.U).detach())
    return None


def _univariate(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """(features, parameters of all of them) -> the univariate maps' values."""

    def transform(features: Tensor, parameters: Tensor) -> Tensor:
        by_entry = parameters.unflatten(-1, (-1, module.total))
        return module.univariate(*unpack(by_entry, module.shapes))(features)

    return transform


def _linearized(hyper: Any, identity: Tensor, context: Any) -> NetworkJacobian:
    """The Jacobian of a coupling's network with respect to its identity features."""
    if context is None:
        return linearize_network(hyper, identity)
    whole = linearize_network(hyper, torch.cat([identity, context], dim=-1))
    return InputSliceJacobian(whole, channels=identity.shape[1], held=context.shape[-1])
