"""The bound rules of zuko."""

# The name of a rule says what it is: bound_<block>.
# ruff: noqa: D103

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
import zuko.nn
from torch import nn
from zuko import transforms
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.lazy import UnconditionalTransform

from inn_guard.core.readable import is_plain, is_unchanged
from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps.autoregressive import Autoregressive
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.coupling import ByChannel, Coupling, interleaved_rows
from inn_guard.lipschitz.maps.spline_closed_forms import rational_quadratic_spline
from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.graph import fx_equivalent
from inn_guard.lipschitz.rules.blocks import SideBySide, fixed_spline
from inn_guard.lipschitz.transformers.affine import Additive, Affine, LogScale, Reparametrised
from inn_guard.lipschitz.transformers.base import Transformer
from inn_guard.lipschitz.transformers.rational_quadratic import RationalQuadraticSpline
from inn_guard.numerics.intervals import Interval


@fx_equivalent.register
def share_weights(module: zuko.nn.MLP) -> nn.Module:
    """The same network with torch's own linear layers, which share the weights."""
    return nn.Sequential(*[_plain(part) for part in module])


@bounded_map.register
def bound_coupling(block: GeneralCouplingTransform, layer: Any) -> BoundedMap:
    mask = block.mask.cpu()
    split = ByChannel(mask.nonzero().squeeze(-1), (~mask).nonzero().squeeze(-1))
    return _coupling(block, layer, split)


@bounded_map.register
def bound_autoregressive(block: MaskedAutoregressiveTransform, layer: Any) -> BoundedMap:
    entries = block.hyper.out_features // block.total
    coupling = _coupling(block, layer, ByChannel.all_of(entries))
    if not isinstance(coupling, Coupling):
        return coupling
    return Autoregressive(coupling)


def _coupling(block: Any, layer: Any, split: ByChannel) -> BoundedMap:
    transformer = _transformer(block)
    if transformer is None:
        name = getattr(block.univariate, "__name__", "this map")
        return NoRule(f"no rule is registered for couplings by {name}")
    rows = interleaved_rows(len(split.change), transformer.count)
    network = SideBySide(fx_equivalent(block.hyper))
    return Coupling(split, network, transformer, rows, layer.context)


def _transformer(block: Any) -> Transformer | None:
    """The transformer of an additive, affine or spline class, or of a partial of it; else None."""
    univariate: Any = block.univariate
    options: dict[str, Any] = {}
    if isinstance(univariate, functools.partial) and not univariate.args:
        univariate, options = univariate.func, univariate.keywords
    if isinstance(univariate, type) and not is_unchanged(univariate):
        return None
    if univariate is transforms.AdditiveTransform and len(block.shapes) == 1:
        return Additive()
    if univariate is transforms.MonotonicRQSTransform and set(options) <= {"slope", "bound"}:
        return _spline(block.shapes[0][0], options)
    if univariate is not transforms.MonotonicAffineTransform or not set(options) <= {"slope"}:
        return None
    return Affine(LogScale(softclip(_limit(univariate, options))))


class _ExponentialSpline(RationalQuadraticSpline):
    """Knots without floors, whose derivatives are exponentials."""

    def derivative(self, raw: Interval) -> Interval:
        """At a knot: e^raw."""
        return raw.exp()

    def derivative_rate(self, raw: Interval) -> Interval:
        """d derivative / d raw = e^raw."""
        return raw.exp()


def _spline(bins: int, options: dict[str, Any]) -> Transformer:
    """Raw widths and heights are clipped softly to half the limit of the log-derivatives."""
    limit = _limit(transforms.MonotonicRQSTransform, options)
    bound = float(options.get("bound", _default(transforms.MonotonicRQSTransform, "bound")))
    spline = _ExponentialSpline(bins, -bound, bound, floors=(0.0, 0.0, 0.0))
    return Reparametrised(
        spline, [softclip(limit / 2)] * (2 * bins) + [softclip(limit)] * (bins - 1)
    )


def _limit(univariate: Any, options: dict[str, Any]) -> float:
    return abs(math.log(options.get("slope", _default(univariate, "slope"))))


def _default(univariate: Any, name: str) -> float:
    return inspect.signature(univariate).parameters[name].default


def softclip(limit: float) -> Activation:
    """x / (1 + |x / limit|), with slope 1 / (1 + |x / limit|)^2, largest at 0."""
    ends = (-limit * (1 + 1e-14), limit * (1 + 1e-14))
    return Activation(
        lambda x: x / (1 + (x / limit).abs()),
        lambda x: 1 / (1 + (x / limit).abs()).square(),
        {0.0: (1.0, 1.0)},
        ends,
        2 / limit,
    )


@bounded_map.register
def bound_unconditional(block: UnconditionalTransform, layer: Any) -> BoundedMap:
    """A transformation built without a context."""
    transform: Any = block(layer.context)
    if is_plain(transform, transforms.PermutationTransform):
        return maps.Rearrangement(lambda x: x[..., transform.order], transform.order.cpu())
    if is_plain(transform, transforms.RotationTransform):
        return maps.LinearMap.computed(transform.R.detach())
    if is_plain(transform, transforms.LULinearTransform):
        return maps.LinearMap.product(transform.L.detach(), transform.U.detach())
    if is_plain(transform, transforms.MonotonicAffineTransform):
        return maps.Diagonal(transform.scale.detach(), transform.shift.detach())
    if is_plain(transform, transforms.AdditiveTransform):
        return maps.Diagonal(torch.ones_like(transform.shift), transform.shift.detach())
    if is_plain(transform, transforms.SoftclipTransform):
        return maps.Elementwise(softclip(float(transform.bound)))
    if is_plain(transform, transforms.MonotonicRQSTransform):
        return _fixed_spline(transform)
    return NoRule(f"no rule is registered for {type(transform).__name__}")


def _fixed_spline(transform: Any) -> BoundedMap:
    x, y = transform.horizontal.detach().double(), transform.vertical.detach().double()
    derivatives = transform.derivatives.detach().double()
    pair = rational_quadratic_spline(x.diff(dim=-1), y.diff(dim=-1), derivatives)
    bound = float(x.abs().max())
    return fixed_spline(pair, -bound, bound, has_identity=True)


def _plain(part: nn.Module) -> nn.Module:
    if not is_plain(part, zuko.nn.Linear):
        return part
    linear_map: Any = part
    if linear_map.weight.dim() != 2:
        return part
    outputs, inputs = linear_map.weight.shape
    linear = nn.Linear(inputs, outputs, bias=linear_map.bias is not None, device="meta")
    linear.weight, linear.bias = linear_map.weight, linear_map.bias
    return linear
