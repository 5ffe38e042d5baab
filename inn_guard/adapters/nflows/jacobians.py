"""nflows: Jacobians of permutations, linear maps, additive and affine couplings."""

from __future__ import annotations

from typing import Any

import torch
from nflows.transforms import (
    LULinear,
    QRLinear,
    SVDLinear,
    autoregressive,
    coupling,
    linear,
    permutations,
)
from nflows.transforms.coupling import AdditiveCouplingTransform, AffineCouplingTransform
from torch import Tensor

from inn_guard.adapters.structured_jacobians import (
    channel_mixing_jacobian,
    coupling_jacobian,
    coupling_network,
    entrywise_jacobian,
    known_jacobian,
    permutation_jacobian,
    spline_coupling_jacobian,
)
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.recorded import recorded_network


@known_jacobian.register
def _permutation(module: permutations.Permutation, x: Tensor, context: Any) -> LayerJacobian:
    order, back = module._permutation, module._inverse_permutation
    return permutation_jacobian(x, order, dim=module._dim, back=back)


@known_jacobian.register(linear.NaiveLinear)
@known_jacobian.register(LULinear)
@known_jacobian.register(QRLinear)
@known_jacobian.register(SVDLinear)
def _linear_map(module: Any, x: Tensor, context: Any) -> LayerJacobian | None:
    if x.dim() != 2:
        return None
    return channel_mixing_jacobian(x, module.weight().detach(), module.bias.detach())


@known_jacobian.register(coupling.PiecewiseLinearCouplingTransform)
@known_jacobian.register(coupling.PiecewiseQuadraticCouplingTransform)
@known_jacobian.register(coupling.PiecewiseCubicCouplingTransform)
@known_jacobian.register(coupling.PiecewiseRationalQuadraticCouplingTransform)
def _spline(module: Any, x: Tensor, context: Any) -> LayerJacobian | None:
    """A spline coupling, whose identity part may go through splines of its own."""
    return spline_coupling_jacobian(module, x, context)


@known_jacobian.register(autoregressive.MaskedAffineAutoregressiveTransform)
@known_jacobian.register(autoregressive.MaskedPiecewiseLinearAutoregressiveTransform)
@known_jacobian.register(autoregressive.MaskedPiecewiseQuadraticAutoregressiveTransform)
@known_jacobian.register(autoregressive.MaskedPiecewiseCubicAutoregressiveTransform)
@known_jacobian.register(autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform)
def _autoregressive(module: Any, x: Tensor, context: Any) -> LayerJacobian | None:
    """Every feature goes through a map whose parameters depend on earlier features."""
    if x.dim() != 2:
        return None
    net = module.autoregressive_net
    network = recorded_network(lambda features: net(features, context), x, module=net)

    def transform(features: Tensor, parameters: Tensor) -> Tensor:
        return module._elementwise_forward(features, parameters)[0]

    return entrywise_jacobian(x, network, transform, passes=x.shape[1])


@known_jacobian.register(AdditiveCouplingTransform)
@known_jacobian.register(AffineCouplingTransform)
def _coupling(module: Any, x: Tensor, context: Any) -> LayerJacobian | None:
    """z1 = x1, and z2 = x2 + t(x1) or z2 = x2 * g(s(x1)) + t(x1)."""
    if module.unconditional_transform is not None:
        return None
    network, partition = coupling_network(module, x, context)
    if isinstance(module, AdditiveCouplingTransform):
        return coupling_jacobian(x, network, partition, None)

    def scale(h: Tensor) -> Tensor:
        # the library's own activation; it takes [shift, s], and the shift does not matter
        return module._scale_and_shift(torch.cat([torch.zeros_like(h), h], dim=1))[0]

    return coupling_jacobian(x, network, partition, scale)
