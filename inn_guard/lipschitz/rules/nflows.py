"""The bound rules of nflows: what its transforms are in the terms of inn_guard.lipschitz, with its own floors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from nflows import transforms as nf
from nflows.transforms.autoregressive import (
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseCubicAutoregressiveTransform,
    MaskedPiecewiseLinearAutoregressiveTransform,
    MaskedPiecewiseQuadraticAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
)
from nflows.transforms.linear import Linear
from nflows.transforms.nonlinearities import (
    PiecewiseCubicCDF,
    PiecewiseLinearCDF,
    PiecewiseQuadraticCDF,
    PiecewiseRationalQuadraticCDF,
)
from nflows.transforms.normalization import ActNorm, BatchNorm
from nflows.transforms.orthogonal import HouseholderSequence
from torch import Tensor, nn
from torch.nn import functional

from inn_guard.lipschitz.maps import closed_forms as blocks
from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps import residual as flows
from inn_guard.lipschitz.maps import spline_closed_forms as splines
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.coupling import ByChannel, Coupling
from inn_guard.lipschitz.networks.activations import known_activation
from inn_guard.lipschitz.transformers.affine import (
    Additive,
    Affine,
    SigmoidScaleBounds,
    SoftplusScaleBounds,
    Transformer,
    scaled,
)
from inn_guard.lipschitz.transformers.quadratic import QuadraticSpline
from inn_guard.lipschitz.transformers.rational_quadratic import (
    LinearSpline,
    RationalQuadraticSpline,
)
from inn_guard.numerics.intervals import Interval


def _interleaved(entries: int, parameters: int) -> Sequence[Tensor]:
    """Rows of parameter p of entry i: i * parameters + p."""
    return [torch.arange(entries) * parameters + p for p in range(parameters)]


def _coupling(
    block: Any, layer: Any, transformer: Transformer, rows: Sequence[Tensor]
) -> BoundedMap:
    if block.unconditional_transform is not None:
        return NoRule(f"{type(block).__name__} with an unconditional transform of the kept part")
    split = ByChannel(block.identity_features.cpu(), block.transform_features.cpu())
    return Coupling(split, block.transform_net, transformer, rows, layer.context)


def _temperature(net: Any) -> float:
    return math.sqrt(getattr(net, "hidden_features", getattr(net, "hidden_channels", 1)))


def _ends(block: Any) -> tuple[float, float, bool]:
    return (
        (-block.tail_bound, block.tail_bound, True)
        if block.tails == "linear"
        else (0.0, 1.0, False)
    )


def _quadratic(block: Any, net: Any) -> RationalQuadraticSpline:
    floors = (block.min_bin_width, block.min_bin_height, block.min_derivative)
    return RationalQuadraticSpline(block.num_bins, *_ends(block), floors, _temperature(net))


@bounded_map.register
def _(block: nf.AdditiveCouplingTransform, layer: Any) -> BoundedMap:
    return _coupling(block, layer, Additive(), [torch.arange(block.num_transform_features)])


@bounded_map.register
def _(block: nf.AffineCouplingTransform, layer: Any) -> BoundedMap:
    n = block.num_transform_features
    scale = SigmoidScaleBounds(1e-3, 1.001, 2.0)
    return _coupling(block, layer, Affine(scale), [torch.arange(n), torch.arange(n, 2 * n)])


@bounded_map.register
def _(block: nf.PiecewiseLinearCouplingTransform, layer: Any) -> BoundedMap:
    rows = _interleaved(block.num_transform_features, block.num_bins)
    return _coupling(block, layer, LinearSpline(block.num_bins, *_ends(block)), rows)


@bounded_map.register
def _(block: nf.PiecewiseRationalQuadraticCouplingTransform, layer: Any) -> BoundedMap:
    spline = _quadratic(block, block.transform_net)
    return _coupling(block, layer, spline, _interleaved(block.num_transform_features, spline.count))


@bounded_map.register
def _(block: nf.PiecewiseQuadraticCouplingTransform, layer: Any) -> BoundedMap:
    temperature = math.sqrt(getattr(block.transform_net, "hidden_features", 1))
    floors = (block.min_bin_width, block.min_bin_height)
    spline = QuadraticSpline(block.num_bins, *_ends(block), floors, (temperature, temperature))
    return _coupling(block, layer, spline, _interleaved(block.num_transform_features, spline.count))


@bounded_map.register(nf.PiecewiseCubicCouplingTransform)
@bounded_map.register(MaskedPiecewiseCubicAutoregressiveTransform)
@bounded_map.register(PiecewiseCubicCDF)
def _(block: Any, layer: Any) -> BoundedMap:
    return NoRule(
        f"{type(block).__name__}: the slope of a monotone cubic comes arbitrarily close to zero inside a bin, so that "
        "its inverse has no bound that holds for all outputs of the network"
    )


def _autoregressive(block: Any, layer: Any, transformer: Transformer) -> BoundedMap:
    net = block.autoregressive_net
    n = net.final_layer.out_features // transformer.count
    every = torch.arange(n)
    return flows.Autoregressive(
        Coupling(
            ByChannel(every, every),
            net,
            transformer,
            _interleaved(n, transformer.count),
            layer.context,
        )
    )


@bounded_map.register
def _(block: MaskedAffineAutoregressiveTransform, layer: Any) -> BoundedMap:
    return _autoregressive(block, layer, Affine(SoftplusScaleBounds(1e-3), (1, 0)))


@bounded_map.register
def _(block: MaskedPiecewiseLinearAutoregressiveTransform, layer: Any) -> BoundedMap:
    return _autoregressive(block, layer, LinearSpline(block.num_bins, 0.0, 1.0, tails=False))


@bounded_map.register
def _(block: MaskedPiecewiseQuadraticAutoregressiveTransform, layer: Any) -> BoundedMap:
    # unlike in the coupling, raw heights are used as they are
    temperature = math.sqrt(getattr(block.autoregressive_net, "hidden_features", 1))
    floors = (block.min_bin_width, block.min_bin_height)
    return _autoregressive(
        block, layer, QuadraticSpline(block.num_bins, *_ends(block), floors, (temperature, 1.0))
    )


@bounded_map.register
def _(block: MaskedPiecewiseRationalQuadraticAutoregressiveTransform, layer: Any) -> BoundedMap:
    return _autoregressive(block, layer, _quadratic(block, block.autoregressive_net))


@bounded_map.register
def _(block: PiecewiseLinearCDF, layer: Any) -> BoundedMap:
    shares = block.unnormalized_pdf.detach().double().softmax(-1)
    left, right, tails = _ends(block)
    pair = splines.linear_spline(torch.full_like(shares, 1 / shares.shape[-1]), shares)
    return flows.KnownConstants(_with_tails(pair, tails), inside=(left, right))


@bounded_map.register
def _(block: PiecewiseQuadraticCDF, layer: Any) -> BoundedMap:
    left, right, tails = _ends(block)
    bins = block.unnormalized_widths.shape[-1]
    spline = QuadraticSpline(bins, left, right, tails, (block.min_bin_width, block.min_bin_height))
    raw = torch.cat([block.unnormalized_widths, block.unnormalized_heights], -1).detach().double()
    theta = [Interval.of(part.flatten()) for part in raw.unbind(-1)]
    inside = Interval(torch.full_like(theta[0].lo, left), torch.full_like(theta[0].hi, right))
    return flows.KnownConstants(
        _with_tails(blocks.elementwise(spline.slope(inside, theta)), tails), inside=(left, right)
    )


@bounded_map.register
def _(block: PiecewiseRationalQuadraticCDF, layer: Any) -> BoundedMap:
    left, right, tails = _ends(block)
    sizes = []
    for raw, floor in (
        (block.unnormalized_widths, block.min_bin_width),
        (block.unnormalized_heights, block.min_bin_height),
    ):
        shares = raw.detach().double().softmax(-1)
        sizes.append((right - left) * (floor + (1 - floor * shares.shape[-1]) * shares))
    derivatives = block.min_derivative + functional.softplus(
        block.unnormalized_derivatives.detach().double()
    )
    derivatives = functional.pad(derivatives, (1, 1), value=1.0) if tails else derivatives
    pair = splines.rational_quadratic_spline(sizes[0], sizes[1], derivatives)
    return flows.KnownConstants(_with_tails(pair, tails), inside=(left, right))


def _with_tails(pair: Pair, tails: bool) -> Pair:  # noqa: FBT001
    roomy = Pair(*(bound * (1 + 1e-12) for bound in pair))
    return Pair(max(1.0, roomy.forward), max(1.0, roomy.inverse)) if tails else roomy


@bounded_map.register
def _(block: ActNorm, layer: Any) -> BoundedMap:
    return maps.Diagonal(block.log_scale.detach().double().exp(), block.shift.detach())


@bounded_map.register
def _(block: BatchNorm, layer: Any) -> BoundedMap:
    if block.training:
        return NoRule("BatchNorm in training mode; call model.eval()")
    scale = block.weight.detach().double() / (block.running_var.double() + block.eps).sqrt()
    return maps.Diagonal(scale, block.bias.detach().double() - block.running_mean.double() * scale)


@bounded_map.register
def _(block: nf.PointwiseAffineTransform, layer: Any) -> BoundedMap:
    if block._scale.dim() > 1 or block._shift.dim() > 1:
        return NoRule("a pointwise affine transform of images")
    return maps.Diagonal(block._scale, block._shift)


@bounded_map.register
def _(block: nf.IdentityTransform, layer: Any) -> BoundedMap:
    return maps.Rearrangement(lambda x: x)


@bounded_map.register
def _(block: nf.Permutation, layer: Any) -> BoundedMap:
    channels = block._permutation.cpu() if block._dim == 1 else None
    return maps.Rearrangement(
        lambda x: block._permute(x, block._permutation, block._dim)[0], channels
    )


@bounded_map.register
def _(block: nf.SqueezeTransform, layer: Any) -> BoundedMap:
    return maps.Rearrangement(lambda x: block(x)[0])


@bounded_map.register
def _(block: Linear, layer: Any) -> BoundedMap:
    return maps.LinearMap.computed(block.weight().detach(), block.bias.detach())


@bounded_map.register
def _(block: nf.OneByOneConvolution, layer: Any) -> BoundedMap:
    order = block.permutation._permutation.cpu()
    weight = block.weight().detach().cpu()
    mixed = torch.zeros_like(weight).index_copy(1, order, weight)
    return maps.LinearMap.computed(mixed, block.bias.detach())


@bounded_map.register
def _(block: HouseholderSequence, layer: Any) -> BoundedMap:
    return maps.LinearMap.computed(block.matrix().detach())


@bounded_map.register
def _(block: nf.LeakyReLU, layer: Any) -> BoundedMap:
    return maps.Elementwise(known_activation(nn.LeakyReLU(float(block.negative_slope))))


@bounded_map.register
def _(block: nf.Tanh, layer: Any) -> BoundedMap:
    return maps.Elementwise(known_activation(nn.Tanh()))


@bounded_map.register
def _(block: nf.Sigmoid, layer: Any) -> BoundedMap:
    temperature = float(block.temperature)
    return maps.Elementwise(
        scaled(known_activation(nn.Sigmoid()), 1.0, temperature),
        inverse=flows.LogitMap(0.0, temperature),
    )
