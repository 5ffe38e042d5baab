"""normflows: Jacobians of its couplings, linear maps and permutations, data -> latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from normflows import flows, nets
from torch import Tensor

from inn_guard.adapters.structured_jacobians import (
    SelectedOutputs,
    channel_mixing_jacobian,
    coupling_jacobian,
    entrywise_jacobian,
    known_jacobian,
    permutation_jacobian,
    spline_coupling_jacobian,
)
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import (
    NetworkJacobian,
    linearize_module,
    linearize_network,
)
from inn_guard.jacobian.recorded import recorded_network
from inn_guard.layers.inverted import InverseJacobian
from inn_guard.layers.linear import ElementwiseJacobian
from inn_guard.layers.partition import Leading, Mask

#: by which the library's forward (latent -> data) multiplies, as a function of the network's output
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "sigmoid": lambda h: 1 / torch.sigmoid(h + 2),
    "sigmoid_inv": lambda h: torch.sigmoid(h + 2),
}


@linearize_module.register(nets.MLP)
@linearize_module.register(nets.ConvNet2d)
def _linearize_net(module: Any, x: Tensor) -> NetworkJacobian:
    return linearize_module(module.net, x)


@known_jacobian.register
def _coupling_block(
    module: flows.AffineCouplingBlock, x: Tensor, context: Any
) -> LayerJacobian | None:
    """An additive or affine coupling of two halves of the channels."""
    split, coupling, _ = module.flows
    # the Jacobian is that of the library's forward, latent -> data, at z, and then inverted
    if split.mode not in ("channel", "channel_inv") or coupling.scale_map not in SCALES:
        return None
    partition = Leading((x.shape[1] + 1) // 2, swapped=split.mode == "channel_inv")
    z = module.inverse(x)[0]
    identity, _ = partition.split(z, dims=z.dim())
    network = linearize_network(coupling.param_map, identity)
    if not coupling.scale:
        return InverseJacobian(coupling_jacobian(z, network, partition, None), z)
    shift_and_scale = SelectedOutputs.deinterleaved(network)
    scale = SCALES[coupling.scale_map]  # type: ignore[index]
    return InverseJacobian(coupling_jacobian(z, shift_and_scale, partition, scale), z)


@known_jacobian.register
def _masked_affine(module: flows.MaskedAffineFlow, x: Tensor, context: Any) -> LayerJacobian | None:
    """An affine coupling whose identity part is where the mask is 1."""
    mask = module.b[0] > 0
    if not torch.equal(mask.to(module.b), module.b[0]):
        return None  # numbers between 0 and 1, which nothing forbids, make it another map
    z = module.inverse(x)[0]

    def shift_and_scale(identity: Tensor) -> Tensor:
        return torch.cat([module.t(identity), module.s(identity)], 1)

    network = recorded_network(shift_and_scale, torch.where(mask, z, 0), module=module)
    return InverseJacobian(coupling_jacobian(z, network, Mask(mask), torch.exp), z)


@known_jacobian.register
def _spline(
    module: flows.CoupledRationalQuadraticSpline, x: Tensor, context: Any
) -> LayerJacobian | None:
    """A spline coupling, whose identity part goes through splines of its own."""
    return spline_coupling_jacobian(module.prqct, x, context)


@known_jacobian.register
def _autoregressive(
    module: flows.MaskedAffineAutoregressive, x: Tensor, context: Any
) -> LayerJacobian | None:
    """The library's forward, latent -> data, maps each feature given earlier ones."""
    if x.dim() != 2:
        return None
    z = module.inverse(x, context)[0]
    net = module.autoregressive_net
    network = recorded_network(lambda features: net(features, context), z, module=net)

    def transform(features: Tensor, parameters: Tensor) -> Tensor:
        return module._elementwise_forward(features, parameters)[0]

    jacobian = entrywise_jacobian(z, network, transform, passes=z.shape[1])
    return None if jacobian is None else InverseJacobian(jacobian, z)


@known_jacobian.register(flows.ActNorm)
@known_jacobian.register(flows.AffineConstFlow)
def _constant_affine(module: Any, x: Tensor, context: Any) -> LayerJacobian | None:
    if not bool(getattr(module, "data_dep_init_done", True)):
        return None  # its next call would set its parameters
    return ElementwiseJacobian(module.inverse(x)[0], (-module.s).exp())


@known_jacobian.register
def _permute(module: flows.Permute, x: Tensor, context: Any) -> LayerJacobian:
    if module.mode == "shuffle":
        return permutation_jacobian(x, module.inv_perm)
    # mode "swap" exchanges the two halves of the channels
    channels = torch.arange(module.num_channels, device=x.device)
    return permutation_jacobian(x, channels.roll(-((module.num_channels + 1) // 2)))


@known_jacobian.register
def _invertible_affine(module: flows.InvertibleAffine, x: Tensor, context: Any) -> LayerJacobian:
    return channel_mixing_jacobian(x, weight_of(module).T)


@known_jacobian.register
def _convolution_1x1(module: flows.Invertible1x1Conv, x: Tensor, context: Any) -> LayerJacobian:
    return channel_mixing_jacobian(x, weight_of(module))


@known_jacobian.register
def _lu_linear(module: flows.LULinearPermute, x: Tensor, context: Any) -> LayerJacobian:
    return channel_mixing_jacobian(x, permuted_weight(module), module.linear.bias.detach())


def weight_of(module: Any) -> Tensor:
    """The matrix W of an InvertibleAffine (x W) or Invertible1x1Conv (W x), data -> latent."""
    if module.use_lu:
        return module._assemble_W().detach()
    return module.W.detach()


def permuted_weight(module: Any) -> Tensor:
    """The matrix of a LULinearPermute, data -> latent: its linear part after its permutation."""
    weight = module.linear.weight().detach()
    return torch.zeros_like(weight).index_copy(1, module.permutation._permutation, weight)
