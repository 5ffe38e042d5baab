"""Rules of normflows. Its own forward is latent -> data, so that most rules divide."""

from __future__ import annotations

from typing import Any

import torch
from normflows import flows
from torch import Tensor

from inn_guard.exact.fixed_point import NoExactRule
from inn_guard.exact.rules import families, register
from inn_guard.exact.steps import Affine, Autoregressive, Step

register("permutation", flows.Permute, flows.Squeeze)(families.moves)
register("elementwise affine", flows.AffineConstFlow, flows.CCAffineConst)(
    families.elementwise_affine
)
register("matrix", flows.InvertibleAffine, flows.Invertible1x1Conv, flows.LULinearPermute)(
    families.matrix
)


@register("elementwise affine", flows.ActNorm)
def exact_actnorm(layer: Any, x: Tensor) -> list[Step]:
    """Constants, once a batch has initialised them."""
    if not bool(layer.module.data_dep_init_done):
        raise NoExactRule("its first batch will initialise it")
    return families.elementwise_affine(layer, x)


@register("additive or affine coupling", flows.AffineCouplingBlock)
def exact_coupling(layer: Any, x: Tensor) -> list[Step]:
    """One coupling between the parts that the block's Split makes."""
    split, coupling, _ = layer.module.flows
    numbers = torch.arange(x[0].numel(), device=x.device).reshape(1, *x.shape[1:])
    (_, transformed), _ = split(numbers)

    def parameters(known: Tensor) -> tuple[Tensor | None, Tensor]:
        (identity, _), _ = split(known)
        raw = coupling.param_map(identity)
        if not coupling.scale:
            return None, raw
        shift, h = raw[:, 0::2], raw[:, 1::2]
        if coupling.scale_map == "exp":
            return h.exp(), shift
        if coupling.scale_map == "sigmoid":
            return torch.sigmoid(h + 2).reciprocal(), shift
        return torch.sigmoid(h + 2), shift

    return [Affine(parameters, transformed.flatten(), dtype=x.dtype, divide=True)]


@register("affine coupling", flows.MaskedAffineFlow)
def exact_masked_coupling(layer: Any, x: Tensor) -> list[Step]:
    """One coupling; entries where the mask is one stay."""
    module = layer.module
    stays = module.b[0].expand(x.shape[1:]).flatten()
    if not bool(((stays == 0) | (stays == 1)).all()):
        raise NoExactRule("its mask has entries other than zero and one")
    changed = (stays == 0).nonzero().flatten()

    def parameters(known: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = module.s(known).exp(), module.t(known)
        return scale.flatten(1)[:, changed], shift.flatten(1)[:, changed]

    return [Affine(parameters, changed, dtype=x.dtype, divide=True)]


@register("autoregressive", flows.MaskedAffineAutoregressive)
def exact_autoregressive(layer: Any, x: Tensor) -> list[Step]:
    """The inverse of the library's forward, which is one pass of the network."""
    module, context = layer.module, layer.context

    def parameters(known: Tensor) -> tuple[Tensor, Tensor]:
        raw = module.autoregressive_net(known, context)
        h, shift = module._unconstrained_scale_and_shift(raw)
        return torch.sigmoid(h + 2.0) + 1e-3, shift

    degrees = module.autoregressive_net.final_layer.degrees
    order = torch.argsort(degrees[:: module._output_dim_multiplier()])
    return [Autoregressive(parameters, order, dtype=x.dtype, divide=True)]
