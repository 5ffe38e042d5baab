"""zuko: Jacobians of its affine and additive couplings, its linear maps and its permutations."""

from __future__ import annotations

from typing import Any

import torch
import zuko.nn
from torch import Tensor
from zuko import transforms
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.lazy import UnconditionalTransform

from inn_guard.adapters.structured_jacobians import (
    Features,
    SelectedOutputs,
    channel_mixing_jacobian,
    coupling_jacobian,
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
    """A coupling whose univariate map is affine or additive."""
    probe = _affine_or_additive(module)
    if probe is None or x.dim() != 2:
        return None
    partition = Features(module.mask.nonzero().squeeze(-1), (~module.mask).nonzero().squeeze(-1))
    identity, _ = partition.split(x, dims=2)
    network = _linearized(module.hyper, identity, context)
    if isinstance(probe, transforms.AdditiveTransform):
        return coupling_jacobian(x, network, partition, None)

    def scale(h: Tensor) -> Tensor:
        # the library's own activation: the scale of its affine map with parameters (shift, h)
        return module.univariate(torch.zeros_like(h), h).scale  # type: ignore[attr-defined]

    return coupling_jacobian(x, SelectedOutputs.deinterleaved(network), partition, scale)


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


def _affine_or_additive(module: GeneralCouplingTransform) -> Any:
    """The coupling's univariate map for zero parameters if it is affine or additive, else None."""
    like = next(module.hyper.parameters())
    probe = module.univariate(*[like.new_zeros(shape) for shape in module.shapes])
    shapes = [list(shape) for shape in module.shapes]
    if isinstance(probe, transforms.AdditiveTransform) and shapes == [[]]:
        return probe
    if isinstance(probe, transforms.MonotonicAffineTransform) and shapes == [[], []]:
        return probe
    return None


def _linearized(hyper: Any, identity: Tensor, context: Any) -> NetworkJacobian:
    """The Jacobian of a coupling's network with respect to its identity features."""
    if context is None:
        return linearize_network(hyper, identity)
    whole = linearize_network(hyper, torch.cat([identity, context], dim=-1))
    return InputSliceJacobian(whole, channels=identity.shape[1], held=context.shape[-1])
