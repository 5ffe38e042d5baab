"""nflows: tangents of permutations, linear maps, additive and affine couplings."""

from __future__ import annotations

from typing import Any

import torch
from nflows.transforms import linear, permutations
from nflows.transforms.coupling import AdditiveCouplingTransform, AffineCouplingTransform
from torch import Tensor
from torch.nn import functional

from inn_guard.adapters.structured_jacobians import (
    Features,
    coupling_jacobian,
    known_jacobian,
    permutation_jacobian,
)
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import AutogradNetwork
from inn_guard.layers.linear import ChannelMixingJacobian


@known_jacobian.register
def _(module: permutations.Permutation, x: Tensor, context: Any) -> LayerJacobian | None:
    dim, order, back = module._dim - x.dim(), module._permutation, module._inverse_permutation
    return permutation_jacobian(
        x,
        lambda v: v.index_select(v.dim() + dim, order),
        lambda v: v.index_select(v.dim() + dim, back),
    )


@known_jacobian.register
def _(module: linear.Linear, x: Tensor, context: Any) -> LayerJacobian | None:
    if x.dim() != 2:
        return None
    W = module.weight().detach()
    inverse = torch.linalg.inv_ex(
        W
    ).inverse  # of a singular W it is not finite or wrong, which is found by its check
    return ChannelMixingJacobian(
        output=functional.linear(x, W, module.bias.detach()),
        jvp=lambda v: functional.linear(v, W),
        vjp=lambda u: u @ W,
        inverse_jvp=lambda u: functional.linear(u, inverse),
        inverse_vjp=lambda v: v @ inverse,
        shape=x.shape,
        weight=W,
    )


@known_jacobian.register
def _(module: AffineCouplingTransform, x: Tensor, context: Any) -> LayerJacobian | None:
    if module.unconditional_transform is not None:
        return None
    partition = Features(module.identity_features, module.transform_features)
    kept, _changed = partition.split(x, dims=x.dim())
    network = AutogradNetwork(lambda features: module.transform_net(features, context), kept)
    if isinstance(module, AdditiveCouplingTransform):
        return coupling_jacobian(x, network, partition, None)

    def scale(h: Tensor) -> Tensor:
        return module._scale_and_shift(torch.cat([torch.zeros_like(h), h], dim=1))[0]

    return coupling_jacobian(x, network, partition, scale)
