"""The bound rules of zuko: what its transformations are in the terms of inn_guard.lipschitz."""

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

from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps import residual as flows
from inn_guard.lipschitz.maps import spline_closed_forms as splines
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.coupling import ByChannel, Coupling
from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.graph import readable
from inn_guard.lipschitz.rules.joined_networks import SideBySide
from inn_guard.lipschitz.transformers.affine import (
    Additive,
    Affine,
    LogScale,
    Reparametrised,
    Transformer,
)
from inn_guard.lipschitz.transformers.rational_quadratic import RationalQuadraticSpline
from inn_guard.numerics.intervals import Interval


@readable.register
def _(module: zuko.nn.MLP) -> nn.Module:
    """The same network with torch's own linear layers, which share the weights."""
    return nn.Sequential(*[_plain(part) for part in module])


@bounded_map.register
def _(block: GeneralCouplingTransform, layer: Any) -> BoundedMap:
    split = ByChannel(
        block.mask.nonzero().squeeze(-1).cpu(), (~block.mask).nonzero().squeeze(-1).cpu()
    )
    return _coupling(block, layer, split)


@bounded_map.register
def _(block: MaskedAutoregressiveTransform, layer: Any) -> BoundedMap:
    every = torch.arange(block.hyper.out_features // block.total)
    described = _coupling(block, layer, ByChannel(every, every))
    return flows.Autoregressive(described) if isinstance(described, Coupling) else described


def _coupling(block: Any, layer: Any, split: ByChannel) -> BoundedMap:
    transformer = _transformer(block)
    if transformer is None:
        return NoRule(
            f"no rule is registered for couplings by {getattr(block.univariate, '__name__', 'this map')}"
        )
    n = len(split.change)
    rows = [torch.arange(n) * transformer.count + p for p in range(transformer.count)]
    return Coupling(split, SideBySide(readable(block.hyper)), transformer, rows, layer.context)


def _transformer(block: Any) -> Transformer | None:
    """Of an affine, additive or spline map of one feature, as its class or a partial of it; None for anything else."""
    univariate: Any = block.univariate
    options: dict[str, Any] = {}
    if isinstance(univariate, functools.partial) and not univariate.args:
        univariate, options = univariate.func, univariate.keywords
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
        """e^raw."""
        return raw.exp()

    def derivative_rate(self, raw: Interval) -> Interval:
        """e^raw."""
        return raw.exp()


def _spline(bins: int, options: dict[str, Any]) -> Transformer:
    """Raw widths and heights are clipped softly to half as much as raw derivatives, which are logarithms."""
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
def _(block: UnconditionalTransform, layer: Any) -> BoundedMap:
    return _of(block(layer.context))


def _of(transform: Any) -> BoundedMap:
    """A transformation that was built without a context."""
    if isinstance(transform, transforms.PermutationTransform):
        return maps.Rearrangement(lambda x: x[..., transform.order], transform.order.cpu())
    if isinstance(transform, transforms.RotationTransform):
        return maps.LinearMap.computed(transform.R.detach())
    if isinstance(transform, transforms.LULinearTransform):
        return maps.LinearMap.computed((transform.L.double() @ transform.U.double()).detach())
    if isinstance(transform, transforms.MonotonicAffineTransform):
        return maps.Diagonal(transform.scale.detach(), transform.shift.detach())
    if isinstance(transform, transforms.AdditiveTransform):
        return maps.Diagonal(torch.ones_like(transform.shift), transform.shift.detach())
    if isinstance(transform, transforms.SoftclipTransform):
        return maps.Elementwise(softclip(float(transform.bound)))
    if isinstance(transform, transforms.MonotonicRQSTransform):
        sizes = [
            knots.detach().double().diff(dim=-1)
            for knots in (transform.horizontal, transform.vertical)
        ]
        pair = splines.rational_quadratic_spline(
            sizes[0], sizes[1], transform.derivatives.detach().double()
        )
        bound = float(transform.horizontal.detach().double().abs().max())
        return flows.KnownConstants(
            Pair(*(max(1.0, side * (1 + 1e-12)) for side in pair)), inside=(-bound, bound)
        )
    return NoRule(f"no rule is registered for {type(transform).__name__}")


def _plain(part: nn.Module) -> nn.Module:
    if not isinstance(part, zuko.nn.Linear) or part.weight.dim() != 2:
        return part
    outputs, inputs = part.weight.shape
    linear = nn.Linear(inputs, outputs, bias=part.bias is not None, device="meta")
    linear.weight, linear.bias = part.weight, part.bias  # type: ignore[assignment]
    return linear
