"""Rules of nflows."""

from __future__ import annotations

from typing import Any

import torch
from nflows.transforms import (
    autoregressive,
    conv,
    coupling,
    linear,
    lu,
    normalization,
    orthogonal,
    permutations,
    qr,
    reshape,
    standard,
    svd,
)
from torch import Tensor
from torch.nn import functional

from inn_guard.adapters.nflows.adapter import Chunk
from inn_guard.exact.fixed_point import NoExactRule
from inn_guard.exact.rules import families, register
from inn_guard.exact.steps import Autoregressive, Step

register(
    "permutation",
    permutations.Permutation,
    permutations.RandomPermutation,
    permutations.ReversePermutation,
    reshape.SqueezeTransform,
    standard.IdentityTransform,
    Chunk,
)(families.moves)
register(
    "elementwise affine",
    standard.PointwiseAffineTransform,
    standard.AffineTransform,
    normalization.ActNorm,
    normalization.BatchNorm,
)(families.elementwise_affine)
register(
    "matrix",
    linear.NaiveLinear,
    lu.LULinear,
    qr.QRLinear,
    svd.SVDLinear,
    conv.OneByOneConvolution,
    orthogonal.HouseholderSequence,
)(families.matrix)


@register(
    "additive or affine coupling",
    coupling.AdditiveCouplingTransform,
    coupling.AffineCouplingTransform,
)
def exact_coupling(layer: Any, x: Tensor) -> list[Step]:
    """One coupling between the identity features and the transformed ones."""
    module, context = layer.module, layer.context
    if module.unconditional_transform is not None:
        raise NoExactRule("it has an unconditional transform of the identity features")
    additive = type(module) is coupling.AdditiveCouplingTransform

    def parameters(identity: Tensor) -> tuple[Tensor | None, Tensor]:
        raw = module.transform_net(identity, context)
        scale, shift = module._scale_and_shift(raw)
        return (None if additive else scale), shift

    step = families.coupling(x, module.identity_features, module.transform_features, parameters)
    return [step]


@register("autoregressive", autoregressive.MaskedAffineAutoregressiveTransform)
def exact_autoregressive(layer: Any, x: Tensor) -> list[Step]:
    """Entry by entry in the order of the network's output degrees."""
    module, context = layer.module, layer.context

    def parameters(known: Tensor) -> tuple[Tensor, Tensor]:
        raw = module.autoregressive_net(known, context)
        h, shift = module._unconstrained_scale_and_shift(raw)
        return functional.softplus(h) + module._epsilon, shift

    degrees = module.autoregressive_net.final_layer.degrees
    order = torch.argsort(degrees[:: module._output_dim_multiplier()])
    return [Autoregressive(parameters, order, dtype=x.dtype)]
