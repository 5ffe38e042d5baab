"""The bound rules of nflows, with its own floors of scales and bins."""

# The name of a rule says what it is: bound_<block>.
# ruff: noqa: D103

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
from nflows.transforms.nonlinearities import (
    PiecewiseCubicCDF,
    PiecewiseLinearCDF,
    PiecewiseQuadraticCDF,
    PiecewiseRationalQuadraticCDF,
)
from nflows.transforms.normalization import ActNorm, BatchNorm
from nflows.transforms.orthogonal import HouseholderSequence
from torch import Tensor, nn

from inn_guard.core.readable import is_of_library
from inn_guard.lipschitz.maps import closed_forms
from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps.autoregressive import Autoregressive
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.coupling import ByChannel, Coupling, blocked_rows, interleaved_rows
from inn_guard.lipschitz.maps.spline_closed_forms import linear_spline
from inn_guard.lipschitz.networks.activations import (
    known_activation,
    scaled,
)
from inn_guard.lipschitz.rules.blocks import (
    OWN_INPUT,
    fixed_rational_quadratic,
    fixed_spline,
    permutation_matrix,
    rational_quadratic,
    returns_input,
    spline_ends,
)
from inn_guard.lipschitz.transformers.affine import (
    Additive,
    Affine,
    SigmoidScaleBounds,
    SoftplusScaleBounds,
)
from inn_guard.lipschitz.transformers.base import Transformer
from inn_guard.lipschitz.transformers.quadratic import QuadraticSpline
from inn_guard.lipschitz.transformers.spline import LinearSpline
from inn_guard.numerics.intervals import Interval

AFFINE_SCALE = SigmoidScaleBounds(1e-3, 1.001, 2.0)  #: sigmoid(s + 2) + 1e-3
SOFTPLUS_SCALE = SoftplusScaleBounds(1e-3)  #: softplus(s) + 1e-3


def _coupling(
    block: Any, layer: Any, transformer: Transformer, rows: Sequence[Tensor] | None = None
) -> BoundedMap:
    """A coupling; ``rows`` default to interleaved parameters."""
    if block.unconditional_transform is not None:
        return NoRule(f"{type(block).__name__} with an unconditional transform of the kept part")
    split = ByChannel(block.identity_features.cpu(), block.transform_features.cpu())
    if not split.is_partition:
        return NoRule("kept and changed entries that are no partition")
    if returns_input(block.transform_net):
        return NoRule(OWN_INPUT)
    if rows is None:
        rows = interleaved_rows(block.num_transform_features, transformer.count)
    return Coupling(split, block.transform_net, transformer, rows, layer.context)


def _autoregressive(block: Any, layer: Any, transformer: Transformer) -> BoundedMap:
    network = block.autoregressive_net
    n = network.final_layer.out_features // transformer.count
    rows = interleaved_rows(n, transformer.count)
    split = ByChannel.all_of(n)
    return Autoregressive(Coupling(split, network, transformer, rows, layer.context))


def _temperature_of_vectors(network: Any) -> float:
    """The divisor of a quadratic spline's parameters: 1 unless a network on vectors gives them."""
    return math.sqrt(getattr(network, "hidden_features", 1))


def _quadratic(block: Any, temperatures: tuple[float, float]) -> QuadraticSpline:
    floors = (block.min_bin_width, block.min_bin_height)
    return QuadraticSpline(block.num_bins, *spline_ends(block), floors, temperatures)


@bounded_map.register
def bound_additive_coupling(block: nf.AdditiveCouplingTransform, layer: Any) -> BoundedMap:
    return _coupling(block, layer, Additive())


@bounded_map.register
def bound_affine_coupling(block: nf.AffineCouplingTransform, layer: Any) -> BoundedMap:
    # in the development version an argument
    default = getattr(type(block), "DEFAULT_SCALE_ACTIVATION", None)
    known = getattr(default, "__module__", "nflows").startswith("nflows")
    if not known or getattr(block, "scale_activation", default) is not default:
        return NoRule("a scale activation of the user's own")
    rows = blocked_rows(block.num_transform_features, 2)
    return _coupling(block, layer, Affine(AFFINE_SCALE), rows)


@bounded_map.register
def bound_linear_coupling(block: nf.PiecewiseLinearCouplingTransform, layer: Any) -> BoundedMap:
    return _coupling(block, layer, LinearSpline(block.num_bins, *spline_ends(block)))


@bounded_map.register
def bound_quadratic_coupling(
    block: nf.PiecewiseQuadraticCouplingTransform, layer: Any
) -> BoundedMap:
    divisor = _temperature_of_vectors(block.transform_net)
    return _coupling(block, layer, _quadratic(block, (divisor, divisor)))


@bounded_map.register
def bound_rational_quadratic_coupling(
    block: nf.PiecewiseRationalQuadraticCouplingTransform, layer: Any
) -> BoundedMap:
    return _coupling(block, layer, rational_quadratic(block, block.transform_net))


@bounded_map.register(nf.PiecewiseCubicCouplingTransform)
@bounded_map.register(MaskedPiecewiseCubicAutoregressiveTransform)
@bounded_map.register(PiecewiseCubicCDF)
def bound_cubic(block: Any, layer: Any) -> BoundedMap:
    return NoRule(
        f"{type(block).__name__}: the slope of a monotone cubic comes arbitrarily close to zero "
        "inside a bin, so that its inverse has no bound that holds for all outputs of the network"
    )


@bounded_map.register
def bound_affine_autoregressive(
    block: MaskedAffineAutoregressiveTransform, layer: Any
) -> BoundedMap:
    return _autoregressive(block, layer, Affine(SOFTPLUS_SCALE, (1, 0)))


@bounded_map.register
def bound_linear_autoregressive(
    block: MaskedPiecewiseLinearAutoregressiveTransform, layer: Any
) -> BoundedMap:
    return _autoregressive(block, layer, LinearSpline(block.num_bins, 0.0, 1.0, tails=False))


@bounded_map.register
def bound_quadratic_autoregressive(
    block: MaskedPiecewiseQuadraticAutoregressiveTransform, layer: Any
) -> BoundedMap:
    # unlike in the coupling, raw heights are used as they are
    divisor = _temperature_of_vectors(block.autoregressive_net)
    return _autoregressive(block, layer, _quadratic(block, (divisor, 1.0)))


@bounded_map.register
def bound_rational_quadratic_autoregressive(
    block: MaskedPiecewiseRationalQuadraticAutoregressiveTransform, layer: Any
) -> BoundedMap:
    return _autoregressive(block, layer, rational_quadratic(block, block.autoregressive_net))


@bounded_map.register
def bound_linear_cdf(block: PiecewiseLinearCDF, layer: Any) -> BoundedMap:
    shares = block.unnormalized_pdf.detach().double().softmax(-1)
    left, right, tails = spline_ends(block)
    pair = linear_spline(torch.full_like(shares, 1 / shares.shape[-1]), shares)
    return fixed_spline(pair, left, right, has_identity=tails)


@bounded_map.register
def bound_quadratic_cdf(block: PiecewiseQuadraticCDF, layer: Any) -> BoundedMap:
    left, right, tails = spline_ends(block)
    bins = block.unnormalized_widths.shape[-1]
    spline = QuadraticSpline(bins, left, right, tails, (block.min_bin_width, block.min_bin_height))
    raw = torch.cat([block.unnormalized_widths, block.unnormalized_heights], -1).detach().double()
    theta = [Interval.of(part.flatten()) for part in raw.unbind(-1)]
    inside = Interval(torch.full_like(theta[0].lo, left), torch.full_like(theta[0].hi, right))
    pair = closed_forms.elementwise(spline.slope(inside, theta))
    return fixed_spline(pair, left, right, has_identity=tails)


@bounded_map.register
def bound_rational_quadratic_cdf(block: PiecewiseRationalQuadraticCDF, layer: Any) -> BoundedMap:
    return fixed_rational_quadratic(block)


@bounded_map.register
def bound_actnorm(block: ActNorm, layer: Any) -> BoundedMap:
    if block.training and not bool(block.initialized):
        return NoRule("ActNorm will be initialised by its next batch; call the model on data first")
    return maps.Diagonal(block.log_scale.detach().double().exp(), block.shift.detach())


@bounded_map.register
def bound_batch_norm(block: BatchNorm, layer: Any) -> BoundedMap:
    if block.training:
        return NoRule("BatchNorm in training mode; call model.eval()")
    scale = block.weight.detach().double() / (block.running_var.double() + block.eps).sqrt()
    return maps.Diagonal(scale, block.bias.detach().double() - block.running_mean.double() * scale)


@bounded_map.register
def bound_pointwise_affine(block: nf.PointwiseAffineTransform, layer: Any) -> BoundedMap:
    if block._scale.dim() > 1 or block._shift.dim() > 1:
        return NoRule("a pointwise affine transform of images")
    return maps.Diagonal(block._scale, block._shift)


@bounded_map.register
def bound_identity(block: nf.IdentityTransform, layer: Any) -> BoundedMap:
    return maps.Rearrangement(lambda x: x)


@bounded_map.register
def bound_permutation(block: nf.Permutation, layer: Any) -> BoundedMap:
    channels = None
    if block._dim == 1:
        channels = block._permutation.cpu()
    return maps.Rearrangement(lambda x: block(x)[0], channels)


@bounded_map.register
def bound_squeeze(block: nf.SqueezeTransform, layer: Any) -> BoundedMap:
    return maps.Rearrangement(lambda x: block(x)[0])


@bounded_map.register(nf.NaiveLinear)
@bounded_map.register(nf.QRLinear)
@bounded_map.register(nf.SVDLinear)
def bound_linear(block: Any, layer: Any) -> BoundedMap:
    return maps.LinearMap.computed(block.weight().detach(), block.bias.detach())


@bounded_map.register
def bound_lu_linear(block: nf.LULinear, layer: Any) -> BoundedMap:
    return maps.LinearMap.product(*block._create_lower_upper(), shift=block.bias.detach())


@bounded_map.register
def bound_one_by_one_convolution(block: nf.OneByOneConvolution, layer: Any) -> BoundedMap:
    if not is_of_library(block.permutation, "nflows"):
        return NoRule("a permutation of the user's own")
    lower, upper = block._create_lower_upper()
    return maps.LinearMap.product(
        lower, upper, permutation_matrix(block.permutation._permutation), shift=block.bias.detach()
    )


@bounded_map.register
def bound_householder(block: HouseholderSequence, layer: Any) -> BoundedMap:
    return maps.LinearMap.computed(block.matrix().detach())


@bounded_map.register
def bound_leaky_relu(block: nf.LeakyReLU, layer: Any) -> BoundedMap:
    return maps.Elementwise(known_activation(nn.LeakyReLU(float(block.negative_slope))))


@bounded_map.register
def bound_tanh(block: nf.Tanh, layer: Any) -> BoundedMap:
    return maps.Elementwise(known_activation(nn.Tanh()))


@bounded_map.register
def bound_sigmoid(block: nf.Sigmoid, layer: Any) -> BoundedMap:
    factor = float(block.temperature)
    sigmoid = scaled(known_activation(nn.Sigmoid()), 1.0, factor)
    return maps.Elementwise(sigmoid, inverse=maps.LogitMap(0.0, factor, float(block.eps)))
