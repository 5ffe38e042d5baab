"""zuko: tangents of its affine and additive couplings, its linear maps and its permutations."""

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
    coupling_jacobian,
    known_jacobian,
    channel_mixing_jacobian,
    permutation_jacobian,
)
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import (
    AutogradNetwork,
    InputSliceJacobian,
    LinearJacobian,
    NetworkJacobian,
    linearize_network,
    linearize_module,
)


@linearize_module.register
def _(module: zuko.nn.Linear, x: Tensor) -> NetworkJacobian:
    plain = type(module) is zuko.nn.Linear and not (
        module._forward_hooks or module._forward_pre_hooks
    )
    return (
        LinearJacobian(module, x)
        if plain and module.weight.dim() == 2
        else AutogradNetwork(module, x)
    )  # type: ignore[arg-type]


@known_jacobian.register
def _(module: GeneralCouplingTransform, x: Tensor, context: Any) -> LayerJacobian | None:
    scale = _scale_of(module)
    partition = Features(module.mask.nonzero().squeeze(-1), (~module.mask).nonzero().squeeze(-1))
    kept = partition.split(x, dims=2)[0] if x.dim() == 2 else None
    if scale is None or kept is None:
        return None
    network = _network(module.hyper, kept, context)
    if isinstance(scale, transforms.AdditiveTransform):
        return coupling_jacobian(x, network, partition, None)

    def g(h: Tensor) -> Tensor:
        return module.univariate(torch.zeros_like(h), h).scale  # type: ignore[attr-defined]

    return coupling_jacobian(x, SelectedOutputs.deinterleaved(network), partition, g)


@known_jacobian.register
def _(module: UnconditionalTransform, x: Tensor, context: Any) -> LayerJacobian | None:
    transform = module(context)
    if x.dim() != 2:
        return None
    if isinstance(transform, transforms.PermutationTransform):
        order, back = transform.order, transform.order.argsort()
        return permutation_jacobian(x, lambda v: v[..., order], lambda v: v[..., back])
    if isinstance(transform, transforms.RotationTransform):
        return channel_mixing_jacobian(x, transform.R.detach())
    if isinstance(transform, transforms.LULinearTransform):
        return channel_mixing_jacobian(x, (transform.L @ transform.U).detach())
    return None


def _scale_of(module: GeneralCouplingTransform) -> Any:
    """What the coupling's univariate map is for zero parameters, if that is affine or additive; else None."""
    like = next(module.hyper.parameters())
    probe = module.univariate(*[like.new_zeros(shape) for shape in module.shapes])
    known = [list(shape) for shape in module.shapes] in ([[], []], [[]])
    affine = isinstance(probe, (transforms.MonotonicAffineTransform, transforms.AdditiveTransform))
    return probe if known and affine else None


def _network(hyper: Any, kept: Tensor, context: Any) -> NetworkJacobian:
    if context is None:
        return linearize_network(hyper, kept)
    whole = linearize_network(hyper, torch.cat([kept, context], dim=-1))
    return InputSliceJacobian(whole, channels=kept.shape[1], held=context.shape[-1])
