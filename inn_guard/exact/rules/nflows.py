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
from inn_guard.exact.splines import Knots, RationalQuadratic
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


@register("spline coupling", coupling.PiecewiseRationalQuadraticCouplingTransform)
def exact_spline_coupling(layer: Any, x: Tensor) -> list[Step]:
    """Rational-quadratic splines of the transformed features, the identity outside of the tails."""
    module, context = layer.module, layer.context
    if module.unconditional_transform is not None:
        raise NoExactRule("it has an unconditional transform of the identity features")
    if module.tails != "linear" or x.dim() != 2:
        raise NoExactRule("there is a rule for splines of vectors with linear tails only")

    def knots(known: Tensor) -> Knots:
        raw = module.transform_net(known.index_select(1, module.identity_features), context)
        raw = raw.reshape(len(known), len(module.transform_features), -1).double()
        widths, heights, slopes = raw.split(
            [module.num_bins, module.num_bins, raw.shape[-1] - 2 * module.num_bins], -1
        )
        # as the library calls its splines
        size = getattr(module.transform_net, "hidden_features", None)
        if size is not None:
            widths, heights = widths / size**0.5, heights / size**0.5
        inner = module.min_derivative + functional.softplus(slopes)
        return Knots(
            _edges(widths, module.min_bin_width, module.tail_bound),
            _edges(heights, module.min_bin_height, module.tail_bound),
            functional.pad(inner, (1, 1), value=1.0),
        )

    return [RationalQuadratic(knots, module.transform_features, dtype=x.dtype)]


def _edges(raw: Tensor, least: float, bound: float) -> Tensor:
    """Knots from -bound to bound whose distances are softmax(raw), at least ``least``."""
    shares = least + (1 - least * raw.shape[-1]) * torch.softmax(raw, -1)
    inner = shares.cumsum(-1)[..., :-1]
    ends = functional.pad(functional.pad(inner, (1, 0)), (0, 1), value=1.0)
    return 2 * bound * ends - bound


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
