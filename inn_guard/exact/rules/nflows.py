"""Rules of nflows."""

from __future__ import annotations

from collections.abc import Callable
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
from inn_guard.exact.splines import Form, Knots, Spline, cubic, rational_quadratic
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
    """Rational-quadratic splines of the transformed features."""
    module = layer.module

    def knots(raw: Tensor) -> Knots:
        widths, heights = _widths_and_heights(module, raw)
        slopes = raw[..., 2 * module.num_bins :]
        inner = module.min_derivative + functional.softplus(slopes)
        if module.tails == "linear":
            inner = functional.pad(inner, (1, 1), value=1.0)
        return _knots(module, widths, heights, inner[..., :-1], inner[..., 1:], rational_quadratic)

    return _spline_coupling(layer, x, knots)


@register("spline coupling", coupling.PiecewiseLinearCouplingTransform)
def exact_linear_spline_coupling(layer: Any, x: Tensor) -> list[Step]:
    """Linear splines, whose bins have equal widths."""
    module = layer.module

    def knots(raw: Tensor) -> Knots:
        heights = torch.softmax(raw, -1)
        slopes = heights * module.num_bins
        equal = torch.full_like(heights, 1 / module.num_bins)
        return _knots(module, equal, heights, slopes, slopes, cubic)

    return _spline_coupling(layer, x, knots)


@register("spline coupling", coupling.PiecewiseQuadraticCouplingTransform)
def exact_quadratic_spline_coupling(layer: Any, x: Tensor) -> list[Step]:
    """Quadratic splines: the slope is linear in each bin."""
    module = layer.module

    def knots(raw: Tensor) -> Knots:
        raw = _divided(module, raw, raw.shape[-1])
        widths = _shares(raw[..., : module.num_bins], module.min_bin_width)
        slopes = functional.softplus(raw[..., module.num_bins :]) + 1e-3
        if module.tails == "linear":
            slopes = _with_slope_one_at_the_ends(slopes, widths)
        area = (0.5 * (slopes[..., :-1] + slopes[..., 1:]) * widths).sum(-1, keepdim=True)
        slopes = module.min_bin_height + (1 - module.min_bin_height) * slopes / area
        left, right = slopes[..., :-1], slopes[..., 1:]
        return _knots(module, widths, 0.5 * (left + right) * widths, left, right, cubic)

    return _spline_coupling(layer, x, knots)


@register("spline coupling", coupling.PiecewiseCubicCouplingTransform)
def exact_cubic_spline_coupling(layer: Any, x: Tensor) -> list[Step]:
    """Monotone cubic splines, with the slopes at the inner knots that the library gives them."""
    module = layer.module

    def knots(raw: Tensor) -> Knots:
        widths, heights = _widths_and_heights(module, raw)
        slopes = heights / widths
        before, after = slopes[..., :-1], slopes[..., 1:]
        first, last = widths[..., :-1], widths[..., 1:]
        mean = (last * before + first * after) / (first + last)
        inner = torch.minimum(2 * torch.minimum(before, after), mean)
        ends = 3 * torch.sigmoid(raw[..., 2 * module.num_bins :])
        start, end = ends[..., :1] * slopes[..., :1], ends[..., 1:] * slopes[..., -1:]
        left, right = torch.cat([start, inner], -1), torch.cat([inner, end], -1)
        return _knots(module, widths, heights, left, right, cubic)

    return _spline_coupling(layer, x, knots)


def _spline_coupling(layer: Any, x: Tensor, knots: Callable[[Tensor], Knots]) -> list[Step]:
    """The identity outside of linear tails, or splines of the unit interval.

    Args:
        layer: a piecewise coupling.
        x: a batch.
        knots: of the network's output, (B, transformed features, numbers of a feature) float64.
    """
    module, context = layer.module, layer.context
    if module.unconditional_transform is not None:
        raise NoExactRule("it has an unconditional transform of the identity features")
    if module.tails not in ("linear", None) or x.dim() != 2:
        raise NoExactRule("there is a rule for splines of vectors only")

    def at(known: Tensor) -> Knots:
        raw = module.transform_net(known.index_select(1, module.identity_features), context)
        return knots(raw.reshape(len(known), len(module.transform_features), -1).double())

    return [Spline(at, module.transform_features, dtype=x.dtype)]


def _divided(module: Any, raw: Tensor, count: int) -> Tensor:
    """The first numbers divided by the square root of the network's width, as the library does."""
    size = getattr(module.transform_net, "hidden_features", None)
    kind = coupling.PiecewiseRationalQuadraticCouplingTransform
    if size is None and isinstance(module, kind):
        size = getattr(module.transform_net, "hidden_channels", None)
    if size is None:
        return raw
    return torch.cat([raw[..., :count] / size**0.5, raw[..., count:]], -1)


def _widths_and_heights(module: Any, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Of the bins, as shares of the whole."""
    bins = module.num_bins
    raw = _divided(module, raw, 2 * bins)
    widths = _shares(raw[..., :bins], module.min_bin_width)
    return widths, _shares(raw[..., bins : 2 * bins], module.min_bin_height)


def _shares(raw: Tensor, least: float) -> Tensor:
    return least + (1 - least * raw.shape[-1]) * torch.softmax(raw, -1)


def _with_slope_one_at_the_ends(slopes: Tensor, widths: Tensor) -> Tensor:
    """Slopes at the inner knots, and equal ones at the ends that are 1 once the area is."""
    first, last = 0.5 * widths[..., :1], 0.5 * widths[..., -1:]
    inner = (0.5 * (slopes[..., :-1] + slopes[..., 1:]) * widths[..., 1:-1]).sum(-1, keepdim=True)
    at_ends = 0.5 * (first * slopes[..., :1] + last * slopes[..., -1:])
    ends = (at_ends + inner) / (1 - 0.5 * first - 0.5 * last)
    return torch.cat([ends, slopes, ends], -1)


def _knots(
    module: Any, widths: Tensor, heights: Tensor, left: Tensor, right: Tensor, form: Form
) -> Knots:
    """Bins of these shares of the interval, with these slopes at their ends."""
    low, high = 0.0, 1.0
    if module.tails == "linear":
        low, high = -module.tail_bound, module.tail_bound

    def edges(shares: Tensor) -> Tensor:
        inner = shares.cumsum(-1)[..., :-1]
        ends = functional.pad(functional.pad(inner, (1, 0)), (0, 1), value=1.0)
        return low + (high - low) * ends

    outside = module.tails == "linear"
    return Knots(edges(widths), edges(heights), left, right, form, outside)


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
