"""normflows: tangents of its couplings, linear maps and permutations, data -> latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from normflows import flows, nets
from torch import Tensor

from inn_guard.adapters.structured_jacobians import (
    SelectedOutputs,
    SwappedOutputs,
    coupling_jacobian,
    known_jacobian,
    channel_mixing_jacobian,
    permutation_jacobian,
)
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import (
    AutogradNetwork,
    NetworkJacobian,
    linearize_network,
    linearize_module,
)
from inn_guard.layers.linear import ElementwiseJacobian
from inn_guard.layers.partition import Leading, Mask

#: the factor by which the library's forward (latent -> data) multiplies, of the network's raw output
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "sigmoid": lambda h: 1 / torch.sigmoid(h + 2),
    "sigmoid_inv": lambda h: torch.sigmoid(h + 2),
}


@linearize_module.register(nets.MLP)
@linearize_module.register(nets.ConvNet2d)
def _(module: Any, x: Tensor) -> NetworkJacobian:
    plain = type(module) in (nets.MLP, nets.ConvNet2d) and not (
        module._forward_hooks or module._forward_pre_hooks
    )
    return linearize_module(module.net, x) if plain else AutogradNetwork(module, x)


@known_jacobian.register
def _(module: flows.AffineCouplingBlock, x: Tensor, context: Any) -> LayerJacobian | None:
    split, coupling, _ = module.flows
    if split.mode not in ("channel", "channel_inv") or coupling.scale_map not in SCALES:
        return None
    partition = Leading((x.shape[1] + 1) // 2, swapped=split.mode == "channel_inv")
    z = module.inverse(x)[0]
    network = linearize_network(coupling.param_map, partition.split(z, dims=z.dim())[0])
    if not coupling.scale:
        return SwappedOutputs(coupling_jacobian(z, network, partition, None), z)
    scale = SCALES[coupling.scale_map]  # type: ignore[index]
    return SwappedOutputs(
        coupling_jacobian(z, SelectedOutputs.deinterleaved(network), partition, scale), z
    )


@known_jacobian.register
def _(module: flows.MaskedAffineFlow, x: Tensor, context: Any) -> LayerJacobian | None:
    mask = module.b[0] > 0
    if not torch.equal(mask.to(module.b), module.b[0]):
        return None
    z = module.inverse(x)[0]
    network = AutogradNetwork(
        lambda kept: torch.cat([module.t(kept), module.s(kept)], 1), torch.where(mask, z, 0)
    )
    return SwappedOutputs(coupling_jacobian(z, network, Mask(mask), torch.exp), z)


@known_jacobian.register
def _(module: flows.AffineConstFlow, x: Tensor, context: Any) -> LayerJacobian | None:
    if not bool(getattr(module, "data_dep_init_done", True)):
        return None
    return ElementwiseJacobian(module.inverse(x)[0], (-module.s).exp())


@known_jacobian.register
def _(module: flows.Permute, x: Tensor, context: Any) -> LayerJacobian | None:
    channels = torch.arange(module.num_channels, device=x.device)
    order = (
        module.inv_perm
        if module.mode == "shuffle"
        else channels.roll(-((module.num_channels + 1) // 2))
    )
    back, dims = order.argsort(), x.dim()
    return permutation_jacobian(
        x,
        lambda v: v.index_select(v.dim() + 1 - dims, order),
        lambda v: v.index_select(v.dim() + 1 - dims, back),
    )


@known_jacobian.register
def _(module: flows.InvertibleAffine, x: Tensor, context: Any) -> LayerJacobian | None:
    return channel_mixing_jacobian(x, weight_of(module).T)


@known_jacobian.register
def _(module: flows.Invertible1x1Conv, x: Tensor, context: Any) -> LayerJacobian | None:
    return channel_mixing_jacobian(x, weight_of(module))


@known_jacobian.register
def _(module: flows.LULinearPermute, x: Tensor, context: Any) -> LayerJacobian | None:
    return channel_mixing_jacobian(x, permuted_weight(module), module.linear.bias.detach())


def weight_of(module: Any) -> Tensor:
    """The matrix W of an InvertibleAffine (x W) or Invertible1x1Conv (W x), data -> latent."""
    return (module._assemble_W() if module.use_lu else module.W).detach()


def permuted_weight(module: Any) -> Tensor:
    """The matrix of a LULinearPermute, data -> latent: that of its linear part after its permutation."""
    weight = module.linear.weight().detach()
    return torch.zeros_like(weight).index_copy(1, module.permutation._permutation, weight)
