"""The bound rules of normflows, data -> latent: what its flows are in the terms of inn_guard.lipschitz."""

from __future__ import annotations

import math
from typing import Any

import torch
from normflows import flows as nf
from normflows.transforms import Logit, Shift
from torch import Tensor
from torch.nn import functional

from inn_guard.adapters.normflows.jacobians import permuted_weight, weight_of
from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps import residual as flows
from inn_guard.lipschitz.maps import spline_closed_forms as splines
from inn_guard.lipschitz.maps.autoregressive import Sequential
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.composition import Composition, inverted
from inn_guard.lipschitz.maps.coupling import ByChannel, ByMask, Coupling
from inn_guard.lipschitz.rules.joined_networks import SideBySide
from inn_guard.lipschitz.transformers.affine import Affine, ScaleBounds, SigmoidScaleBounds
from inn_guard.lipschitz.transformers.inverse_affine import (
    ExpScale,
    InverseSigmoidScale,
    ShiftedBack,
    ShiftedBackThenScaled,
)
from inn_guard.lipschitz.transformers.rational_quadratic import RationalQuadraticSpline
from inn_guard.numerics.intervals import Interval

#: what data -> latent multiplies by, of the network's raw output
SCALES: dict[str, ScaleBounds] = {
    "exp": ExpScale(falling=True),
    "sigmoid": SigmoidScaleBounds(0.0, 1.0, 2.0),
    "sigmoid_inv": InverseSigmoidScale(2.0),
}


@bounded_map.register
def _(block: nf.AffineCouplingBlock, layer: Any) -> BoundedMap:
    split, coupling, _ = block.flows
    if split.mode not in ("channel", "channel_inv") or coupling.scale_map not in SCALES:
        return NoRule(f"a coupling split by {split.mode}, or with a scale map of the user's own")
    network: Any = coupling.param_map

    def make(box: Interval) -> BoundedMap:
        channels = box.shape[0]
        halves = ByChannel.halves(channels, (channels + 1) // 2)
        halves = halves.swapped if split.mode == "channel_inv" else halves
        n = len(halves.change)
        if not coupling.scale:
            return Coupling(halves, network, ShiftedBack(), [torch.arange(n)])
        rows = [torch.arange(n) * 2, torch.arange(n) * 2 + 1]
        scale = SCALES[coupling.scale_map]  # type: ignore[index]
        return Coupling(halves, network, ShiftedBackThenScaled(scale), rows)

    return maps.ShapeDependent(make, (network,))


@bounded_map.register
def _(block: nf.MaskedAffineFlow, layer: Any) -> BoundedMap:
    mask, parts = block.b[0].detach().cpu(), dict(block.named_children())
    if not bool(((mask == 0) | (mask == 1)).all()) or "t" not in parts:
        return NoRule(
            "a masked affine flow whose mask is not of zeros and ones, or without a translation"
        )
    n = mask.shape[0]
    if "s" not in parts:
        return Coupling(ByMask(mask > 0), parts["t"], ShiftedBack(), [torch.arange(n)])
    rows = [torch.arange(n), torch.arange(n, 2 * n)]
    both = SideBySide(parts["t"], parts["s"])
    return Coupling(ByMask(mask > 0), both, ShiftedBackThenScaled(ExpScale(falling=True)), rows)


@bounded_map.register
def _(block: nf.CoupledRationalQuadraticSpline, layer: Any) -> BoundedMap:
    inner = block.prqct
    if inner.tails not in ("linear", None) or isinstance(inner.tail_bound, Tensor):
        return NoRule("a spline with circular tails, or with bounds of its own for every entry")
    spline = _spline(inner, inner.transform_net)
    split = ByChannel(inner.identity_features.cpu(), inner.transform_features.cpu())
    n = len(split.change)
    rows = [torch.arange(n) * spline.count + p for p in range(spline.count)]
    coupling = Coupling(split, inner.transform_net, spline, rows, layer.context)
    return Composition((coupling, _cdf(inner.unconditional_transform)))


@bounded_map.register
def _(block: nf.AutoregressiveRationalQuadraticSpline, layer: Any) -> BoundedMap:
    inner = block.mprqat
    spline = _spline(inner, inner.autoregressive_net)
    every = torch.arange(inner.autoregressive_net.final_layer.out_features // spline.count)
    rows = [every * spline.count + p for p in range(spline.count)]
    coupling = Coupling(
        ByChannel(every, every), inner.autoregressive_net, spline, rows, layer.context
    )
    return flows.Autoregressive(coupling)


@bounded_map.register
def _(block: nf.MaskedAffineAutoregressive, layer: Any) -> BoundedMap:
    features = torch.arange(block.features)
    scale = SigmoidScaleBounds(1e-3, 1.001, 2.0)
    rows = [2 * features, 2 * features + 1]
    affine = Affine(scale, order=(1, 0))
    coupling = Coupling(
        ByChannel(features, features), block.autoregressive_net, affine, rows, layer.context
    )
    return Sequential(
        flows.Autoregressive(coupling), lambda x, theta: (x - theta[1]) / scale.value(theta[0])
    )


def _spline(inner: Any, network: Any) -> RationalQuadraticSpline:
    floors = (inner.min_bin_width, inner.min_bin_height, inner.min_derivative)
    left, right, tails = _ends(inner)
    temperature = math.sqrt(
        getattr(network, "hidden_features", getattr(network, "hidden_channels", 1))
    )
    return RationalQuadraticSpline(inner.num_bins, left, right, tails, floors, temperature)


def _ends(inner: Any) -> tuple[float, float, bool]:
    bound = float(inner.tail_bound)
    return (-bound, bound, True) if inner.tails == "linear" else (0.0, 1.0, False)


def _cdf(inner: Any) -> BoundedMap:
    """The spline of known knots on the kept entries; the others pass."""
    left, right, tails = _ends(inner)
    sizes = []
    for raw, floor in (
        (inner.unnormalized_widths, inner.min_bin_width),
        (inner.unnormalized_heights, inner.min_bin_height),
    ):
        shares = raw.detach().double().softmax(-1)
        sizes.append((right - left) * (floor + (1 - floor * shares.shape[-1]) * shares))
    derivatives = inner.min_derivative + functional.softplus(
        inner.unnormalized_derivatives.detach().double()
    )
    derivatives = functional.pad(derivatives, (1, 1), value=1.0) if tails else derivatives
    pair = splines.rational_quadratic_spline(sizes[0], sizes[1], derivatives)
    return flows.KnownConstants(
        Pair(*(max(1.0, bound * (1 + 1e-12)) for bound in pair)), inside=(left, right)
    )


@bounded_map.register
def _(block: nf.AffineConstFlow, layer: Any) -> BoundedMap:
    if block.s.dim() > 2 and block.s[0, 0].numel() > 1:
        return NoRule("scales that differ from pixel to pixel")
    scale = (-block.s.detach().double()).exp().reshape(-1)
    return maps.Diagonal(scale, -block.t.detach().double().reshape(-1) * scale)


@bounded_map.register
def _(block: nf.Permute, layer: Any) -> BoundedMap:
    order = block.inv_perm.cpu() if block.mode == "shuffle" else None
    return maps.Rearrangement(lambda x: block.inverse(x)[0], order)


@bounded_map.register
def _(block: nf.Squeeze, layer: Any) -> BoundedMap:
    return maps.Rearrangement(lambda x: block.inverse(x)[0])


@bounded_map.register
def _(block: nf.InvertibleAffine, layer: Any) -> BoundedMap:
    return maps.LinearMap.computed(weight_of(block).T)


@bounded_map.register
def _(block: nf.Invertible1x1Conv, layer: Any) -> BoundedMap:
    return maps.LinearMap.computed(weight_of(block))


@bounded_map.register
def _(block: nf.LULinearPermute, layer: Any) -> BoundedMap:
    return maps.LinearMap.computed(permuted_weight(block), block.linear.bias.detach())


@bounded_map.register
def _(block: nf.Residual, layer: Any) -> BoundedMap:
    residual = flows.Residual(block.iresblock.nnet)
    return residual if block.reverse else inverted(residual)


@bounded_map.register
def _(block: Logit, layer: Any) -> BoundedMap:
    return flows.LogitMap(float(block.alpha))


@bounded_map.register
def _(block: Shift, layer: Any) -> BoundedMap:
    return maps.Diagonal(
        torch.tensor(1.0, dtype=torch.float64),
        torch.tensor(float(block.shift), dtype=torch.float64),
    )
